"""Runs of the demo's job on the cluster, as tests look at them: steps, checkpoints, order of the data, W&B's rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm_jobs import SlurmJob

from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.runtimes.spec import spec_of

START_S = 300.0
"""Until a job of this kind trains, on a machine with two cores that others use too."""


@dataclass
class DemoRun(SlurmJob):
    """A job of the demo's real programs. A run that is resumed is another one of these, in the same directory."""

    def rows(self, attempt: int | None = None, after: float = 0.0) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of one attempt, and of steps that began after a moment."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [r for r in found if attempt in (None, r["attempt"]) and r["time"] - r["step_seconds"] > after]

    def trains(self, attempt: int, after: float = 0.0) -> dict[str, Any]:
        """Waits for a step that an attempt began after a moment, and ended."""
        found = self.until(lambda: self.rows(attempt, after) or self.events("outcome", attempt=attempt), START_S)
        assert "step" in found[0], self.story()
        return dict(found[0])

    def checkpoints(self) -> dict[int, bool]:
        """The checkpoints by step, and whether they are whole."""
        folders = (self.run_dir / "checkpoints").glob("checkpoint-*")
        return {int(path.name.partition("-")[2]): (path / "complete.json").exists() for path in folders}

    def saved(self) -> int:
        """The step of the newest whole checkpoint; 0 before the first."""
        return max((step for step, whole in self.checkpoints().items() if whole), default=0)

    def kill_program(self, node: str, program: str) -> float:
        """Kills a process of a node, found by its command line, with SIGKILL; returns when."""
        pid = next(pid for pid, line in self.cluster.processes(self.host(node)).items() if program in line)
        now = time.time()
        os.kill(pid, signal.SIGKILL)
        return now

    def told_by(self, command: str, *arguments: str) -> str:
        """What a command of hpc-gym says of the run, without line breaks that only a screen needs."""
        program = [sys.executable, "-m", "hpc_gym.cli.main", command, str(self.run_dir), *arguments]
        wide = {**os.environ, "COLUMNS": "2000"}
        return subprocess.run(program, env=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def resumed(self, *overrides: str) -> tuple[DemoRun, str]:
        """`hpc-gym resume` of it: the job that goes on, and what was said."""
        said = self.told_by("resume", *overrides)
        assert "Submitted job" in said, said
        return DemoRun(HpcgymJob.find(str(self.run_dir)), self.cluster), said

    def assert_nothing_lost_or_doubled(self, steps: int) -> None:
        """Whatever the run went through, its metrics and W&B's have each step that was trained on, and every step the
        prompts that an undisturbed run gives it.
        """
        told = [(row["attempt"], row["step"]) for row in self.rows()]
        assert len(set(told)) == len(told)
        last = {step: (attempt, step) for attempt, step in told}
        assert sorted(last) == list(range(1, steps + 1))
        prompts = self.plan.training.prompts_per_step
        for row in self.rows():
            first = (row["step"] - 1) * prompts
            assert (row["first_draw"], row["last_draw"]) == (first, first + prompts - 1)
        assert max(row["logp_diff"] for row in self.rows()) < 1e-4
        at_wandb = [(row["attempt"], row["step"]) for row in self._wandb_rows()]
        assert len(set(at_wandb)) == len(at_wandb)
        assert set(last.values()) <= set(at_wandb) <= set(told)

    def _wandb_rows(self) -> list[dict[str, Any]]:
        """The training steps in W&B's offline files, which are of one run."""
        folders = sorted((self.run_dir / "wandb").glob("offline-run-*"))
        assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
        files = [str(file) for folder in folders for file in folder.glob("*.wandb")]
        program = [str(spec_of("train-cpu").python), str(Path(__file__).with_name("wandb_rows.py")), *files]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        return [row for row in map(json.loads, done.stdout.splitlines()) if "train/loss" in row]
