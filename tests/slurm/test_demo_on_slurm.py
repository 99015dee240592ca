"""The demo's job on the real Slurm: vLLM, NeMo Gym, TRL and DeepSpeed over nodes with addresses of their own, through
what a cluster's day brings.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from demo_job import small_demo
from slurm_jobs import SlurmJob, outcome_of

from hpc_gym import submit
from hpc_gym.jobs.resume import resume

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STEPS = 16
START_S = 300.0
"""Until a job of this kind trains, on a machine with two cores that others use too."""


@pytest.fixture
def demo(slurm_cluster: Cluster, shared: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmJob:
    """The demo's job as a heterogeneous one over three nodes, of a few small steps and without evaluations."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    job = submit(
        "demo",
        [
            *small_demo(shared, STEPS),
            "cluster.slurm.rollout.partition=cpu",
            "grpo.per_device_train_batch_size=16",
            "checkpoints.every=2",
        ],
        cluster="slurm-test",
    )
    return SlurmJob(job, slurm_cluster)


def rows(run: SlurmJob, attempt: int | None = None, after: float = 0.0) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one attempt, and of steps that began after a moment."""
    path = run.run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [r for r in found if attempt in (None, r["attempt"]) and r["time"] - r["step_seconds"] > after]


def trains(run: SlurmJob, attempt: int, after: float = 0.0) -> dict[str, Any]:
    """Waits for a step that an attempt began after a moment, and ended."""
    found = run.until(lambda: rows(run, attempt, after) or run.events("outcome", attempt=attempt), within_s=START_S)
    assert "step" in found[0], run.story()
    return dict(found[0])


def kill(run: SlurmJob, node: str, program: str) -> float:
    """Kills a process of a node, found by its command line, with SIGKILL; returns when."""
    pid = next(pid for pid, line in run.cluster.processes(run.host(node)).items() if program in line)
    now = time.time()
    os.kill(pid, signal.SIGKILL)
    return now


def complete(run: SlurmJob) -> dict[int, bool]:
    """The checkpoints by step, and whether they are whole."""
    folders = (run.run_dir / "checkpoints").glob("checkpoint-*")
    return {int(path.name.partition("-")[2]): (path / "complete.json").exists() for path in folders}


def told_by(run: SlurmJob, *command: str) -> str:
    """What a command of hpc-gym says of the run, without line breaks that only a screen needs."""
    program = [sys.executable, "-m", "hpc_gym.cli.main", *command, str(run.run_dir)]
    wide = {**os.environ, "COLUMNS": "2000"}
    return subprocess.run(program, env=wide, capture_output=True, text=True, check=False).stdout


def test_the_demo_lives_through_a_day_without_losing_or_doubling_a_step(demo: SlurmJob) -> None:
    run = demo
    run.all_started(within_s=60)
    trains(run, 1)
    assert run.host("rollout-0") == "node1"
    assert len({run.host(node) for node in ("rollout-0", "train-0", "train-1")}) == 3

    # Everything of the rollout node dies, and lives again in place.
    killed = kill(run, "rollout-0", "VLLM::EngineCore")
    kill(run, "rollout-0", "python app.py")
    kill(run, "rollout-0", "hpc_gym.rollout.server")
    services = ("vllm-0", "gym", "rollout-server")
    run.until(lambda: all(run.events("restarting", each, attempt=1) for each in services))
    noticed = max(event["time"] for event in run.events("restarting", attempt=1))
    run.figure("vLLM's engine, a server of NeMo Gym and the rollout server killed: noticed", noticed - killed, 20)
    again = trains(run, 1, after=killed)
    run.figure("the same: trains again", again["time"] - killed, START_S)

    # The time limit is near, in the middle of the rollouts.
    run.until(lambda: len(rows(run, after=again["time"])) > 0, within_s=60)
    asked = time.time()
    run.cluster.slurm("scancel", "--batch", "--signal=USR2", run.id)
    stopped = outcome_of(run)
    assert stopped["kind"] == "requeue", run.story()
    run.figure("time limit near, in the middle of rollouts: saved and stopped", stopped["time"] - asked, 40)
    saved = max(step for step, whole in complete(run).items() if whole)
    assert saved == rows(run, 1)[-1]["step"]

    # A node of the trainers crashes.
    resumed = trains(run, 2)
    run.figure("the same: trains again", resumed["time"] - asked, START_S)
    assert resumed["step"] == saved + 1
    run.until(lambda: max(step for step, whole in complete(run).items() if whole) > saved, within_s=60)
    lost, crashed = run.host("train-1", attempt=2), time.time()
    run.cluster.crash(lost)
    silent = run.until(lambda: run.events("silent", attempt=2))[0]["time"]
    run.figure("a training node crashes: noticed", silent - crashed, 15)
    assert outcome_of(run, 2)["kind"] == "requeue", run.story()
    saved = max(step for step, whole in complete(run).items() if whole)
    resumed = trains(run, 3)
    run.figure("the same: trains again", resumed["time"] - crashed, START_S)
    assert resumed["step"] == saved + 1
    assert lost not in {event["host"] for event in run.events("joined", attempt=3)}

    run.freed(within_s=200)
    assert run.job.state == "COMPLETED", run.story()
    assert run.left() == {}
    assert (run.run_dir / "model" / "model.safetensors").stat().st_size > 0
    last = {row["step"]: row for row in rows(run)}
    assert list(last) == list(range(1, STEPS + 1))
    prompts = run.plan.training.prompts_per_step
    for row in rows(run):
        first = (row["step"] - 1) * prompts
        assert (row["first_draw"], row["last_draw"]) == (first, first + prompts - 1)
    assert max(row["logp_diff"] for row in rows(run)) < 1e-4
    runs = [path.name.rpartition("-")[2] for path in (run.run_dir / "wandb").glob("offline-run-*")]
    assert (len(runs), len(set(runs))) == (3, 1)


def test_a_rank_killed_while_it_saves_fails_the_demo_which_says_so_everywhere_and_resumes(demo: SlurmJob) -> None:
    run = demo
    run.all_started(within_s=60)
    trains(run, 1)
    run.until(lambda: 2 in complete(run) and complete(run)[2], within_s=60)
    seen = len(run.events("saving", "rank-1"))
    run.until(lambda: len(run.events("saving", "rank-1")) > seen, within_s=60)
    killed = run.kill("train-1", "rank-1")
    run.figure("a rank is killed while it saves: nodes free", run.freed() - killed, within=10)
    assert run.job.state == "FAILED"
    sentence = run.output().splitlines()[-1]
    assert sentence.startswith("FAILED: role train, node train-1, process rank-1 was killed by SIGKILL")
    assert sentence in told_by(run, "status")
    assert told_by(run, "logs").splitlines()[-1].endswith(sentence)
    assert run.left() == {}

    whole = max(step for step, whole in complete(run).items() if whole)
    again = SlurmJob(resume(str(run.run_dir)), run.cluster)
    assert trains(again, 2)["step"] == whole + 1
    cancelled = time.time()
    again.cluster.slurm("scancel", again.id)
    again.figure("scancel of the demo: nodes free", again.freed() - cancelled, within=10)
    assert again.job.get_info()["State"] == "CANCELLED", again.story()
    assert again.left() == {}
