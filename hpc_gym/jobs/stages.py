"""The stages of a job, from the queue to the exported model, each with its state, times and what can be said of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpc_gym.jobs.progress import AttemptProgress, ProcessProgress
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.slurm import Standing
from hpc_gym.jobs.state import has_ended
from hpc_gym.plan.plan import Plan, Process

StageState = Literal["waiting", "running", "done", "failed"]

_HOSTS_SHOWN = 4
_LOADING = ("vllm", "judge")
_ROLLOUTS = re.compile(
    r"(?P<what>step (?P<step>\d+)(?:/\d+)?|evaluation (?P<when>\w+), step \d+): rollouts (?P<done>\d+)/(?P<of>\d+)"
)
_TITLES = {
    "vllm": "vLLM",
    "gym": "NeMo Gym",
    "rollout-server": "rollout server",
    "environment-server": "environment server",
    "judge": "judge",
    "judge-server": "judge server",
    "rank": "trainers",
}


@dataclass(frozen=True)
class Stage:
    """One stage of a job. `began`: seconds since the epoch; `seconds`: how long it took, or has taken so far."""

    name: str
    state: StageState = "waiting"
    detail: str = ""
    began: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Moment:
    """What is known of a job at one moment: all that its stages follow from."""

    progress: AttemptProgress
    """Of the last attempt."""
    last_step: Mapping[str, Any]
    """The newest line of metrics.jsonl, empty before the first."""
    evaluations: Sequence[Mapping[str, Any]]
    standing: Standing
    queued_since: float | None
    """When it was submitted, or the attempt before ended. None: not known."""
    now: float


def stages_of(plan: Plan, record: JobRecord, moment: Moment) -> tuple[Stage, ...]:
    """The stages of the last attempt; of the next one, while the job waits for it in the queue."""
    if moment.standing.state == "PENDING":
        moment = replace(moment, progress=AttemptProgress(moment.progress.attempt))
    stages = [
        *_nodes(plan, record, moment),
        *_services(plan, moment.progress, moment.now),
        *_training(plan, moment, Path(record.run_dir)),
    ]
    if has_ended(moment.standing.state):
        # What was under way when a job failed did not get done.
        end: StageState = "done" if moment.standing.state == "COMPLETED" else "failed"
        stages = [replace(each, state=end) if each.state == "running" else each for each in stages]
    return tuple(stages)


def _nodes(plan: Plan, record: JobRecord, moment: Moment) -> list[Stage]:
    progress, now, of = moment.progress, moment.now, len(plan.nodes)
    first = min(progress.joined.values(), default=None)
    began = first if progress.began is None else progress.began
    queued = _timed("queued", moment.queued_since, began, now)
    if moment.standing.state == "PENDING":
        again = "again" if progress.attempt else ""
        queued = replace(queued, detail=": ".join(filter(None, (again, moment.standing.waiting))))
    joined = f"{len(progress.joined)}/{of}"
    if record.kind == "slurm" and progress.hosts:
        joined += f": {_hosts(list(dict.fromkeys(progress.hosts.values())))}"
    last = max(progress.joined.values()) if len(progress.joined) >= of else None
    stages = [queued, replace(_timed("nodes", began, last, now), detail=joined)]
    if record.kind == "slurm" and (progress.checked or not progress.processes):
        fit = max(progress.checked.values()) if len(progress.checked) >= of else None
        detail = f"{len(progress.checked)}/{of} nodes are fit" if first else ""
        # A node may be checked before the coordinator has noted that it joined, by another clock.
        since = min([first, *progress.checked.values()]) if first is not None else None
        stages.append(replace(_timed("checks", since, fit, now), detail=detail))
    return stages


def _hosts(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_HOSTS_SHOWN])
    return shown if len(names) <= _HOSTS_SHOWN else f"{shown} and {len(names) - _HOSTS_SHOWN} more"


def _services(plan: Plan, progress: AttemptProgress, now: float) -> list[Stage]:
    """One stage per kind of process: `vllm-0` and `vllm-1` are one."""
    groups: dict[str, list[tuple[str, Process]]] = {}
    for node in plan.nodes:
        for process in node.processes:
            kind = re.sub(r"-(\d+|headless)$", "", process.name)
            groups.setdefault(kind, []).append((node.name, process))
    stages = []
    for kind, members in groups.items():
        known = [_progress(progress, *member) for member in members]
        ready = [each.ready for each in known if each.ready is not None]
        began = min((each.started for each in known if each.started is not None), default=None)
        ended = max(ready) if len(ready) == len(members) else None
        title, restarts = _TITLES.get(kind, kind), sum(each.restarts for each in known)
        words = [f"{len(ready)}/{len(members)} ready", *_counted(known)]
        words += [_said(kind, each) for each in known if each.text and each.ready is None][:1]
        words += [f"started again {restarts} time{'s' if restarts > 1 else ''}"] if restarts else []
        stages.append(replace(_timed(title, began, ended, now), detail=", ".join(filter(None, words))))
    return stages


def _counted(known: Sequence[ProcessProgress]) -> list[str]:
    """Of how many servers how many are up, over all nodes."""
    counted = [each.counted for each in known if each.counted]
    if not counted:
        return []
    return [f"{sum(each[0] for each in counted)}/{sum(each[1] for each in counted)} {counted[0][2]}"]


def _said(kind: str, process: ProcessProgress) -> str:
    """What a process says on its way to ready, without what is counted already."""
    if kind in _LOADING:
        # All that its probe can tell is that nothing answers yet.
        return "loading"
    return re.sub(r"^\d+ ?/ ?\d+ servers(, )?", "", process.text)


def _training(plan: Plan, moment: Moment, run_dir: Path) -> list[Stage]:
    """The parts that training goes through one after another; each begins when the one before it has ended."""
    progress, evaluations, last_step = moment.progress, moment.evaluations, moment.last_step
    evaluation, max_steps = plan.training.evaluation, int(plan.training.grpo.get("max_steps", 0))
    ranks = [(node.name, each) for node in plan.nodes for each in node.processes if each.kind == "task"]
    known = [_progress(progress, *rank) for rank in ranks]
    ready = [each.ready for each in known if each.ready is not None]
    began = all_ready = max(ready) if ready and len(ready) == len(ranks) else None
    step = int(last_step.get("step", 0))
    stepped = float(last_step["time"]) if max_steps and step >= max_steps else None
    ended = [each.exited for each in known]
    trained = stepped is not None or not max_steps
    exported = max(filter(None, ended)) if trained and (run_dir / "model").is_dir() and all(ended) else None
    # A run that was complete and became longer has results of its first end.
    final = [each for each in evaluations if int(each.get("step", 0)) >= max_steps]

    parts: list[tuple[str, float | None, str]] = []
    if evaluation.at_start and evaluation.sources:
        parts.append(("evaluation before", _evaluated(evaluations, "before"), _rewards(evaluations, "before")))
    parts.append(("training", stepped, f"step {step}/{max_steps}"))
    if evaluation.at_end and evaluation.sources:
        parts.append(("evaluation after", _evaluated(final, "after"), _rewards(final, "after")))
    parts.append(("export", exported, ""))
    stages = []
    for name, end, detail in parts:
        if name == "training" and step:
            began = began or all_ready
        stage = _timed(name, began, end, moment.now)
        if stage.state == "running":
            stage = replace(stage, detail=", ".join(filter(None, [detail, under_way(name, step, known)])))
        elif stage.state == "done" or name == "training":
            stage = replace(stage, detail=detail)
        stages.append(stage)
        began = end if stage.state == "done" else None
    return stages


def under_way(stage: str, step: int, ranks: Sequence[ProcessProgress]) -> str:
    """What the ranks say of what they do in a stage, after `step` steps; "" where what they said last is of another.

    Each rank counts its own share of the rollouts.
    """
    said = [each.text for each in ranks if each.text and each.ready is not None and each.exited is None]
    if any(each.saving for each in ranks):
        return "saving a checkpoint"
    found = [match for text in said if (match := _ROLLOUTS.fullmatch(text))]
    if stage == "training":
        found = [match for match in found if match["when"] == "step" or int(match["step"] or 0) > step]
    else:
        found = [match for match in found if match["when"] and stage == f"evaluation {match['when']}"]
    if found:
        of = [match for match in found if match["what"] == found[0]["what"]]
        what = found[0]["what"] if stage == "training" else ""
        done, wanted = (sum(int(match[name]) for match in of) for name in ("done", "of"))
        return f"{what}: rollouts {done}/{wanted}".removeprefix(": ")
    if stage == "export" and any(text.startswith("exporting") for text in said):
        return "writing the model"
    return ""


def _progress(progress: AttemptProgress, node: str, process: Process) -> ProcessProgress:
    """How far a process is; one that nobody asks whether it is ready counts as ready when it has started."""
    known = progress.processes.get((node, process.name), ProcessProgress())
    return known if process.ready else replace(known, ready=known.started)


def _timed(name: str, began: float | None, ended: float | None, now: float) -> Stage:
    """A stage that began and ended at those moments; one that ended before this attempt began has no duration."""
    if ended is not None:
        return Stage(name, "done", began=began, seconds=None if began is None or ended < began else ended - began)
    if began is None:
        return Stage(name)
    return Stage(name, "running", began=began, seconds=max(0.0, now - began))


def _evaluated(evaluations: Iterable[Mapping[str, Any]], when: str) -> float | None:
    return next((float(each.get("time", 0.0)) for each in evaluations if each.get("when") == when), None)


def _rewards(evaluations: Iterable[Mapping[str, Any]], when: str) -> str:
    for each in evaluations:
        if each.get("when") == when:
            told = []
            for environment, rewards in each.get("rewards", {}).items():
                known = [reward for reward in rewards if reward is not None]
                told.append(f"{environment} {sum(known) / len(known):.3f}" if known else f"{environment} all failed")
            return ", ".join(told)
    return ""
