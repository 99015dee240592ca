"""A run's numbers: `metrics.jsonl` and `evaluations.jsonl` in the run directory, and Weights & Biases where it is
wanted.

The files are append-only and every line carries the attempt: after a resume, steps after the checkpoint come again, and
a reader takes the last line of a step.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.files import append_whole, json_rows

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
WANDB_CLOSE_S = 20.0
WANDB_CLOSE_FAILED_S = 3.0
_WANDB_WRITES_S = 0.5
"""How long W&B may keep what it was given out of its file. Its own 15 s lost steps that were in a checkpoint, and so
never came again, when a rank was killed.
"""
_ON_ITS_WAY_S = 0.05
"""From this process to W&B's service."""
WANDB_WRITES_EVERY_S = 60.0
"""Its service writes every 15 s; it loses no more than this when it dies."""
WANDB_RESTARTS = 3


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line. Numbers that are not finite have no JSON and are left out.

    Begins on a fresh line when the file's last one was cut off by the end of an earlier attempt. Raises OSError, with
    nothing written, where there is no room.
    """
    kept = {key: value for key, value in record.items() if not (isinstance(value, float) and not math.isfinite(value))}
    line = json.dumps(kept, allow_nan=False).encode() + b"\n"
    append_whole(path, line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON objects of the file, in order; a line that was cut off is passed over."""
    return json_rows(path.read_bytes()) if path.exists() else []


class Recorder:
    """Writes what rank 0 measured. The other ranks have none."""

    def __init__(self, plan: Plan, attempt: int) -> None:
        self._run_dir = Path(plan.run_dir)
        self._attempt = attempt
        self._max_steps = int(plan.training.grpo["max_steps"])
        self._wandb = WandbRun(plan, attempt) if plan.training.wandb else None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One training step."""
        record = {"attempt": self._attempt, "step": step, "max_steps": self._max_steps, "time": time.time(), **metrics}
        append_line(self._run_dir / METRICS, record)
        if self._wandb is not None:
            self._wandb.log({f"train/{name}": value for name, value in metrics.items()}, step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation: `step`, `when`, and `rewards` per environment, one per row, None where every rollout
        failed.
        """
        append_line(self._run_dir / EVALUATIONS, {"attempt": self._attempt, "time": time.time(), **record})
        if self._wandb is not None:
            means = {}
            for environment, rewards in record["rewards"].items():
                known = [reward for reward in rewards if reward is not None]
                if known:
                    means[f"eval/reward/{environment}"] = sum(known) / len(known)
            self._wandb.log(means, int(record["step"]))

    def evaluated(self, step: int, when: str) -> bool:
        """Whether an earlier attempt has done that evaluation."""
        records = read_lines(self._run_dir / EVALUATIONS)
        return any(record.get("step") == step and record.get("when") == when for record in records)

    def flush(self) -> None:
        """Returns when what was recorded outlives this process. A checkpoint must not have a step whose row may still
        be lost, for it does not come again.
        """
        if self._wandb is not None:
            self._wandb.flush()

    def close(self, exit_code: int) -> None:
        if self._wandb is not None:
            self._wandb.close(exit_code)


class WandbRun:
    """The run at Weights & Biases. All attempts of a run share its id, so that they continue one curve.

    Training does not end because W&B's service does, a process of its own (`wandb-core`): it is started again, and gets
    what the one before had not yet written.
    """

    def __init__(self, plan: Plan, attempt: int) -> None:
        self._plan = plan
        self._attempt = attempt
        self._restarts = 0
        self._unwritten: deque[tuple[float, dict[str, float]]] = deque()
        self._run: Any = self._begin()

    def _begin(self) -> Any:
        import wandb

        plan = self._plan
        settings = dict(plan.training.wandb or {})
        run = wandb.init(
            project=settings.get("project"),
            entity=settings.get("entity"),
            name=settings.get("name") or plan.name,
            group=settings.get("group"),
            tags=settings.get("tags"),
            id=settings.get("run_id"),
            mode="online" if settings.get("mode") == "online" else "offline",
            # Offline too: it is written into the file, and without it `wandb sync` (0.31) puts this part in the place
            # of those before it.
            resume="allow",
            dir=plan.run_dir,  # it makes the folder `wandb` in there
            config=_public_config(plan),
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                save_code=False,
                disable_git=True,
                x_transaction_log_flush_interval=_WANDB_WRITES_S,
            ),
        )
        run.define_metric("*", step_metric="step")
        return run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # With a metric of our own as step: W&B drops what it gets for a step of its counter that has passed, and after
        # a resume, steps come again.
        record = {"step": step, "attempt": self._attempt, **metrics}
        self._unwritten.append((time.time(), record))
        while self._unwritten[0][0] < time.time() - WANDB_WRITES_EVERY_S:
            self._unwritten.popleft()
        if self._run is None:
            return
        try:
            self._run.log(record)
        except Exception as error:
            self._begin_again(error)

    def _begin_again(self, error: Exception) -> None:
        """After a broken connection wandb 0.31 raises the same error for ever, unless all of it is set up anew."""
        import wandb

        written, self._run = self._written(), None
        self._restarts += 1
        if self._restarts <= WANDB_RESTARTS:
            print(f"W&B's service (wandb-core) is gone ({error!r}): starting it again", flush=True)
            try:
                with suppress(Exception):
                    wandb.teardown()
                self._run = self._begin()
                lost = [record for moment, record in self._unwritten if moment > written]
                self._unwritten = deque((time.time(), record) for record in lost)
                for record in lost:
                    self._run.log(record)
                return
            except Exception as again:
                self._run, error = None, again
        print(f"W&B is given up ({error!r}): from here on the metrics are in {METRICS} only", flush=True)

    def flush(self) -> None:
        """Returns when W&B's service has written what it was given, or is late."""
        if self._run is None or not self._unwritten:
            return
        given, end = self._unwritten[-1][0], time.monotonic() + 2 * _WANDB_WRITES_S
        while self._written() < given + _ON_ITS_WAY_S and time.monotonic() < end:
            time.sleep(0.02)

    def _written(self) -> float:
        """The moment up to which its service has written what it got."""
        try:
            return Path(self._run.settings.sync_file).stat().st_mtime
        except OSError:
            return 0.0

    def close(self, exit_code: int) -> None:
        """Ends the run; gives up after a while, since a network that is gone must not keep the job's nodes."""

        def finish() -> None:
            try:
                self._run.finish(exit_code)
            except Exception as error:
                print(f"W&B's run could not be ended: {error!r}", flush=True)

        if self._run is None:
            return
        closing = threading.Thread(target=finish, daemon=True)
        closing.start()
        closing.join(WANDB_CLOSE_S if exit_code == 0 else WANDB_CLOSE_FAILED_S)


def _public_config(plan: Plan) -> dict[str, Any]:
    """What a reader of the curves wants to know; no environment variables, since secrets travel in them."""
    training = plan.training
    return {
        "model": training.model,
        "grpo": dict(training.grpo),
        "deepspeed": dict(training.deepspeed),
        "prompts_per_step": training.prompts_per_step,
        "world_size": training.world_size,
        "max_staleness": training.max_staleness,
        "seed": plan.seed,
        "environments": [environment.name for environment in plan.environments],
        "nodes": {node.name: [process.name for process in node.processes] for node in plan.nodes},
    }
