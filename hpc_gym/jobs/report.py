"""What a run reached, from its files: rewards at start and end, gains on held-out rows, time per stage, the curve."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.errors import UserError
from hpc_gym.jobs.json_lines import JsonLines

EDGE_STEPS = 5
"""Steps at either end of the training whose mean reward is reported."""
Z_90 = statistics.NormalDist().inv_cdf(0.95)
"""Standard normal quantile of a two-sided 90 % interval: 1.645."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Gain:
    """Mean difference of paired rewards, and the 90 % interval of that mean."""

    mean: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class EnvironmentReport:
    """One environment. Rewards are means; None where there were no such steps or evaluations."""

    name: str
    first_steps: float | None
    """Mean reward of the first EDGE_STEPS training steps."""
    last_steps: float | None
    before: float | None
    """Mean reward on the held-out rows before training."""
    after: float | None
    gain: Gain | None


@dataclass(frozen=True)
class Report:
    """A run's outcome."""

    run_dir: Path
    steps: int
    environments: tuple[EnvironmentReport, ...]
    together: Gain | None
    """Over the held-out rows of all environments."""
    largest_logp_difference: float | None
    """Largest mean |log p(trainer) - log p(vLLM)| of a step."""
    failed: int
    """Rollouts of the training that failed and were not trained on."""
    seconds: Mapping[str, float]
    """Time per stage of the job, in order."""


def report(run_dir: Path) -> Report:
    """The report of a run, finished or not. Raises UserError when nothing has been measured yet."""
    steps = training_steps(run_dir)
    evaluations = _evaluations(run_dir)
    if not steps and not evaluations:
        raise UserError(f"{run_dir} has no training step and no evaluation yet: there is nothing to report.")
    before, after = (evaluations.get(when, {}).get("rewards", {}) for when in ("before", "after"))
    names = sorted({*_environments(steps), *before, *after})
    differences = [d for name in names for d in _differences(before.get(name, ()), after.get(name, ()))]
    logp = [step["logp_diff"] for step in steps if "logp_diff" in step]
    return Report(
        run_dir=run_dir,
        steps=len(steps),
        environments=tuple(_environment(name, steps, before.get(name, ()), after.get(name, ())) for name in names),
        together=paired_gain(differences),
        largest_logp_difference=max(logp, default=None),
        failed=sum(int(step.get("failed", 0)) for step in steps),
        seconds=_stages(run_dir, steps, evaluations),
    )


def paired_gain(differences: Sequence[float]) -> Gain | None:
    """The mean of paired differences and its 90 % interval, mean ± z · s / √n; None for fewer than two.

    The interval for paired observations of NIST/SEMATECH e-Handbook of Statistical Methods, section 7.3.1.1, with the
    normal quantile in place of Student's t: for 200 rows and more they differ by half a percent.
    """
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    half = Z_90 * statistics.stdev(differences) / math.sqrt(len(differences))
    return Gain(mean=mean, low=mean - half, high=mean + half, rows=len(differences))


def training_steps(run_dir: Path) -> list[Record]:
    """The lines of `metrics.jsonl` by step. After a resume steps come again: the last line of a step counts."""
    by_step = {line["step"]: line for line in JsonLines(run_dir / "metrics.jsonl").new()}
    return [line for _, line in sorted(by_step.items())]


def draw_curve(run_dir: Path, path: Path) -> Path:
    """Draws the reward of every step per environment, and the evaluations at both ends, to a PNG file."""
    # Not pyplot: it keeps figures and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, evaluations = training_steps(run_dir), _evaluations(run_dir)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, name in enumerate(_environments(steps)):
        colour = f"C{position}"
        points = [(step["step"], step[f"reward/{name}"]) for step in steps if f"reward/{name}" in step]
        numbers, rewards = zip(*points, strict=True)
        axes.plot(numbers, rewards, color=colour, alpha=0.35, linewidth=1)
        axes.plot(numbers, _smooth(rewards), color=colour, linewidth=2, label=f"{name}: training, mean of 5 steps")
        held_out = [
            (record["step"], statistics.fmean(known))
            for record in evaluations.values()
            if (known := [reward for reward in record["rewards"].get(name, ()) if reward is not None])
        ]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=colour, markersize=8, label=f"{name}: held-out rows")
    axes.set(xlabel="training step", ylabel="mean reward", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _environment(
    name: str, steps: Sequence[Record], before: Sequence[float | None], after: Sequence[float | None]
) -> EnvironmentReport:
    rewards = [step[f"reward/{name}"] for step in steps if f"reward/{name}" in step]
    return EnvironmentReport(
        name=name,
        first_steps=_mean(rewards[:EDGE_STEPS]),
        last_steps=_mean(rewards[-EDGE_STEPS:]),
        before=_mean(before),
        after=_mean(after),
        gain=paired_gain(_differences(before, after)),
    )


def _differences(before: Sequence[float | None], after: Sequence[float | None]) -> list[float]:
    """After minus before, of the rows that have a reward in both."""
    # Not strict: the second evaluation may not be there yet.
    pairs = zip(before, after, strict=False)
    return [last - first for first, last in pairs if first is not None and last is not None]


def _evaluations(run_dir: Path) -> dict[str, Record]:
    """The evaluations by `before`, `after` or `step N`, in order of steps; the last line of each counts."""
    found: dict[str, Record] = {}
    for line in sorted(JsonLines(run_dir / "evaluations.jsonl").new(), key=lambda line: int(line["step"])):
        found[line["when"] if line["when"] != "step" else f"step {line['step']}"] = line
    return found


def _stages(run_dir: Path, steps: Sequence[Record], evaluations: Mapping[str, Record]) -> dict[str, float]:
    """Seconds per stage, from the times that the files of the run carry; stages not reached are left out."""
    try:
        submitted = float(json.loads((run_dir / "job.json").read_text())["submitted"])
    except (OSError, ValueError, KeyError):
        return {}
    marks: list[tuple[str, float]] = []
    before, after = evaluations.get("before"), evaluations.get("after")
    if before:
        marks += [("start-up", before["time"] - before["seconds"]), ("evaluation before", before["time"])]
    elif steps:
        marks.append(("start-up", steps[0]["time"] - steps[0].get("step_seconds", 0.0)))
    if steps:
        marks.append(("training", steps[-1]["time"]))
    if after:
        marks.append(("evaluation after", after["time"]))
    events = JsonLines(run_dir / "attempts" / "latest" / "events.jsonl")
    ended = [event["time"] for event in events.new() if event["event"] == "outcome"]
    if ended:
        marks.append(("export, stop", ended[-1]))
    stages, since = {}, submitted
    for stage, until in marks:
        stages[stage] = max(0.0, until - since)
        since = until
    return stages


def _environments(steps: Iterable[Record]) -> list[str]:
    prefix = "reward/"
    return sorted({key.removeprefix(prefix) for step in steps for key in step if key.startswith(prefix)})


def _mean(rewards: Iterable[float | None]) -> float | None:
    known = [reward for reward in rewards if reward is not None]
    return statistics.fmean(known) if known else None


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last five values."""
    return [statistics.fmean(values[max(0, end - EDGE_STEPS) : end]) for end in range(1, len(values) + 1)]
