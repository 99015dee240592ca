"""NeMo Gym and the judge on nodes of their own, with the real parts."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from demo_job import small_demo
from judged_node import JudgedNodes, judged_node, judged_requests, wait_ready

from hpc_gym import submit
from hpc_gym.jobs import local
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.records import JobRecord
from hpc_gym.protocol.trajectory import Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

STEPS = 4


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HpcgymJob]:
    """The demo's job with two environment nodes, small, without evaluations."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    changes = [
        *small_demo(tmp_path / "runs", STEPS),
        *("nodes.environment=2", "nodes.train=1"),
        *("grpo.per_device_train_batch_size=24", f"checkpoints.every={STEPS}"),
    ]
    started = submit("demo", changes)
    try:
        yield started
    finally:
        local.kill(JobRecord.read(started.run_dir))


def rows(job: HpcgymJob) -> list[dict[str, Any]]:
    path = job.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log(job: HpcgymJob, name: str) -> str:
    path = job.run_dir / "attempts" / "1" / "logs" / f"{name}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def events(job: HpcgymJob, event: str) -> list[dict[str, Any]]:
    text = (job.run_dir / "attempts" / "1" / "events.jsonl").read_text()
    return [each for each in map(json.loads, text.splitlines()) if each["event"] == event]


def until(job: HpcgymJob, condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        ended = job.state in ("FAILED", "CANCELLED", "COMPLETED")
        if ended or time.monotonic() > end:
            logs = sorted((job.run_dir / "attempts" / "1" / "logs").iterdir())
            pytest.fail("\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs))
        time.sleep(0.2)


def test_a_job_with_environment_nodes_trains_and_survives_the_loss_of_an_environment_server(job: HpcgymJob) -> None:
    until(job, lambda: len(rows(job)) >= 1, 240)
    told = {each.name: each.detail.partition(",")[0] for each in job.status().stages if "ready" in each.detail}
    assert told == {
        "vLLM": "1/1 ready",
        "rollout server": "1/1 ready",
        "NeMo Gym": "2/2 ready",
        "environment server": "2/2 ready",
        "trainers": "1/1 ready",
    }
    (server,) = [
        each
        for each in events(job, "started")
        if (each["node"], each["process"]) == ("environment-1", "environment-server")
    ]
    # Stopped first, so that it has rollouts when it dies.
    os.kill(server["pid"], signal.SIGSTOP)
    time.sleep(8)
    assert len(rows(job)) < STEPS
    os.kill(server["pid"], signal.SIGKILL)
    until(job, lambda: len(rows(job)) >= STEPS, 120)
    until_done = time.monotonic() + 60
    while job.state == "RUNNING" and time.monotonic() < until_done:
        time.sleep(0.2)
    assert job.state == "COMPLETED", job.status().outcome

    steps = rows(job)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert sum(row["failed"] for row in steps) == 0, "what was lost is tried on the other node"
    assert max(row["logp_diff"] for row in steps) < 1e-4, "token-exact through the relay"
    restarted = [each["node"] for each in events(job, "restarting") if each["process"] == "environment-server"]
    assert restarted == ["environment-1"]
    rollout = log(job, "rollout-0-rollout-server")
    assert "attempt 1/2 failed: environment_server_lost: environment-1 " in rollout
    assert not log(job, "rollout-0-gym")
    assert (job.run_dir / "model" / "model.safetensors").stat().st_size > 0
    assert local.processes(JobRecord.read(job.run_dir)) == []


def test_a_judge_and_nemo_gym_on_nodes_of_their_own_reward_the_same_answers(tmp_path: Path) -> None:
    with judged_node(JudgedNodes, tmp_path) as apart:
        with apart.client() as connected:
            wait_ready(apart, connected)
            requests = judged_requests()
            trajectories = connected.run(requests)
            # What the environment nodes say is asked every half second.
            end = time.monotonic() + 15
            while (health := connected.health()[0]) is None or health.judged < 2 * len(requests):
                assert time.monotonic() < end, health
                time.sleep(0.2)
        assert [each.reason for each in trajectories if each.outcome is Outcome.FAILED] == [], apart.log("gym")[-3000:]
        assert [each.reward for each in trajectories] == [1.0] * len(requests)
        assert health.judged == 2 * len(requests), "each answer in both orders"
        assert health.status.startswith("vLLM 1/1 ready, NeMo Gym ")
        assert health.status.endswith(" on 1/1 environment nodes, judge ready")
        assert "judge ready" in apart.log("environment-server")
        assert (apart.private / "judge" / "judge.sock").exists()
        assert not (apart.private / "rollout" / "judge.sock").exists()
        settings = yaml.safe_load((apart.folder / "gym" / "environment-0.yaml").read_text())
        assert settings["judge_base_url"].startswith("http://127.0.0.1:")
