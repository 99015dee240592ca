"""The stages of a job, from the queue to the exported model, each with its state, times and what can be said of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpc_gym.jobs.progress import AttemptProgress, ProcessProgress
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.state import has_ended
from hpc_gym.plan.plan import Plan, Process

StageState = Literal["waiting", "running", "done", "failed"]

_TITLES = {"vllm": "vLLM", "gym": "NeMo Gym", "rollout-server": "rollout server", "rank": "trainers", "judge": "judge"}


@dataclass(frozen=True)
class Stage:
    """One stage of a job. `began`: seconds since the epoch; `seconds`: how long it took, or has taken so far."""

    name: str
    state: StageState = "waiting"
    detail: str = ""
    began: float | None = None
    seconds: float | None = None


def stages_of(
    plan: Plan,
    record: JobRecord,
    progress: AttemptProgress,
    last_step: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    state: str,
    now: float,
) -> tuple[Stage, ...]:
    """The stages of the last attempt. `last_step`: the newest line of metrics.jsonl, empty before the first."""
    stages = [
        *_nodes(plan, record, progress, now),
        *_services(plan, progress, now),
        *_training(plan, progress, last_step, evaluations, Path(record.run_dir), now),
    ]
    if has_ended(state):
        # What was under way when a job failed did not get done.
        end: StageState = "done" if state == "COMPLETED" else "failed"
        stages = [replace(each, state=end) if each.state == "running" else each for each in stages]
    return tuple(stages)


def _nodes(plan: Plan, record: JobRecord, progress: AttemptProgress, now: float) -> list[Stage]:
    first, all_there = min(progress.joined.values(), default=None), len(progress.joined) >= len(plan.nodes)
    detail = f"{len(progress.joined)}/{len(plan.nodes)}"
    queued = _timed("queued", record.submitted if progress.attempt <= 1 else None, first, now)
    if first is None:
        return [queued, Stage("nodes", detail=detail)]
    last = max(progress.joined.values()) if all_there else None
    return [queued, replace(_timed("nodes", first, last, now), detail=detail)]


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


def _training(
    plan: Plan,
    progress: AttemptProgress,
    last_step: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    run_dir: Path,
    now: float,
) -> list[Stage]:
    """The parts that training goes through one after another; each begins when the one before it has ended."""
    evaluation, max_steps = plan.training.evaluation, int(plan.training.grpo.get("max_steps", 0))
    ranks = [(node.name, each) for node in plan.nodes for each in node.processes if each.kind == "task"]
    known = [_progress(progress, *rank) for rank in ranks]
    ready = [each.ready for each in known if each.ready is not None]
    began = all_ready = max(ready) if ready and len(ready) == len(ranks) else None
    said = next((each.text for each in known if each.text and each.ready is not None), "")
    if re.match(r"step \d+/\d+", said):
        # metrics.jsonl says that, and more.
        said = ""
    step = int(last_step.get("step", 0))
    stepped = float(last_step["time"]) if max_steps and step >= max_steps else None
    ended = [each.exited for each in known]
    exported = max(filter(None, ended)) if (run_dir / "model").is_dir() and all(ended) else None

    parts: list[tuple[str, float | None, str]] = []
    if evaluation.at_start and evaluation.sources:
        parts.append(("evaluation before", _evaluated(evaluations, "before"), _rewards(evaluations, "before")))
    parts.append(("training", stepped, f"step {step}/{max_steps}"))
    if evaluation.at_end and evaluation.sources:
        parts.append(("evaluation after", _evaluated(evaluations, "after"), _rewards(evaluations, "after")))
    parts.append(("export", exported, ""))
    stages = []
    for name, end, detail in parts:
        if name == "training" and step:
            began = began or all_ready
        stage = _timed(name, began, end, now)
        if stage.state == "running":
            stage = replace(stage, detail=", ".join(filter(None, [detail, said])))
        elif stage.state == "done" or name == "training":
            stage = replace(stage, detail=detail)
        stages.append(stage)
        began = end if stage.state == "done" else None
    return stages


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
