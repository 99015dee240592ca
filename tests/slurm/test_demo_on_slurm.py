"""The demo's job on the real Slurm: vLLM, NeMo Gym, TRL and DeepSpeed over nodes with addresses of their own, through
what a cluster's day brings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from demo_job import small_demo
from demo_runs import START_S, DemoRun
from slurm_jobs import outcome_of

from hpc_gym import submit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STEPS = 16


@pytest.fixture
def demo(slurm_cluster: Cluster, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DemoRun]:
    """Submits the demo's job over three nodes, of a few small steps and without evaluations."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))

    def submitted(*changes: str) -> DemoRun:
        overrides = [*small_demo(shared, STEPS), "checkpoints.every=2", *changes]
        run = DemoRun(submit("demo", overrides, cluster="slurm-test"), slurm_cluster)
        run.all_started(within_s=60)
        run.trains(1)
        return run

    return submitted


def test_the_demo_lives_through_a_day_without_losing_or_doubling_a_step(demo: Callable[..., DemoRun]) -> None:
    run = demo("cluster.slurm.partition=preempt", "grpo.per_device_train_batch_size=16")
    assert len({run.host(node) for node in ("rollout-0", "train-0", "train-1")}) == 3

    # Everything of the rollout node dies, and lives again in place.
    killed = run.kill_program("rollout-0", "VLLM::EngineCore")
    run.kill_program("rollout-0", "python app.py")
    run.kill_program("rollout-0", "hpc_gym.rollout.server")
    # So does W&B's service, which gets again what it had not written.
    run.kill_program("train-0", "wandb-core")
    services = ("vllm-0", "gym", "rollout-server")
    run.until(lambda: all(run.events("restarting", each, attempt=1) for each in services))
    noticed = max(event["time"] for event in run.events("restarting", attempt=1))
    run.figure("vLLM's engine, a server of NeMo Gym and the rollout server killed: noticed", noticed - killed, 20)
    again = run.trains(1, after=killed)
    run.figure("the same: trains again", again["time"] - killed, START_S)

    # Another job takes its nodes, in the middle of the rollouts.
    run.until(lambda: len(run.rows(after=again["time"])) > 0, within_s=60)
    asked = time.time()
    run.cluster.slurm("sbatch", "-pgpu", "-N5", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    stopped = outcome_of(run)
    assert stopped["kind"] == "requeue", run.story()
    # Slurm's scheduler looks every second.
    within = run.cluster.settings().grace + 5
    run.figure("preempted in the middle of rollouts: saved and stopped", stopped["time"] - asked, within)
    assert {event["exit_code"] for event in run.events("exited", attempt=1) if event["role"] == "train"} == {85}
    saved = run.saved()
    assert saved == run.rows(1)[-1]["step"]

    # A node of the trainers crashes.
    resumed = run.trains(2)
    run.figure("the same: trains again", resumed["time"] - asked, START_S)
    assert resumed["step"] == saved + 1
    run.until(lambda: run.saved() > saved, within_s=60)
    lost, crashed = run.host("train-1", attempt=2), time.time()
    run.cluster.crash(lost)
    silent = run.until(lambda: run.events("silent", attempt=2))[0]["time"]
    run.figure("a training node crashes: noticed", silent - crashed, 15)
    assert outcome_of(run, 2)["kind"] == "requeue", run.story()
    saved = run.saved()
    resumed = run.trains(3)
    run.figure("the same: trains again", resumed["time"] - crashed, START_S)
    assert resumed["step"] == saved + 1
    assert lost not in {event["host"] for event in run.events("joined", attempt=3)}

    run.freed(within_s=200)
    assert run.job.state == "COMPLETED", run.story()
    assert run.left() == {}
    assert (run.run_dir / "model" / "model.safetensors").stat().st_size > 0
    run.assert_nothing_lost_or_doubled(STEPS)


def test_a_rank_killed_in_a_save_fails_the_demo_which_says_so_and_goes_on_with_other_nodes(
    demo: Callable[..., DemoRun],
) -> None:
    run = demo("cluster.slurm.rollout.partition=cpu", "grpo.per_device_train_batch_size=12")
    assert run.host("rollout-0") == "node1"
    run.until(lambda: run.saved() >= 2, within_s=60)
    seen = len(run.events("saving", "rank-1"))
    run.until(lambda: len(run.events("saving", "rank-1")) > seen, within_s=60)
    killed = run.kill("train-1", "rank-1")
    run.figure("a rank is killed while it saves: nodes free", run.freed() - killed, within=10)
    assert run.job.state == "FAILED"
    sentence = run.output().splitlines()[-1]
    assert sentence.startswith("FAILED: role train, node train-1, process rank-1 was killed by SIGKILL")
    assert sentence in run.told_by("status")
    assert run.told_by("logs").splitlines()[-1].endswith(sentence)
    assert run.left() == {}

    # From two training nodes to three, and to its end.
    saved = run.saved()
    steps, asked = saved + 3, time.time()
    run, said = run.resumed("nodes.train=3", f"grpo.max_steps={steps}")
    assert "3 training ranks instead of 2 train on the same 3 prompts per step with grpo.per_device_tr" in said
    assert f"from step {saved} of {steps}" in said
    resumed = run.trains(2)
    run.figure("failed, resumed with 3 training nodes instead of 2: trains", resumed["time"] - asked, START_S)
    assert resumed["step"] == saved + 1
    run.freed(within_s=200)
    assert run.job.state == "COMPLETED", run.story()
    run.assert_nothing_lost_or_doubled(steps)

    # From three to one, and on from its end.
    assert f"is complete, with its {steps} steps: to go on, ask for more" in run.told_by("resume", "nodes.train=1")
    asked = time.time()
    run, said = run.resumed("nodes.train=1", f"grpo.max_steps={steps + 100}")
    assert "1 training rank instead of 3 trains on the same 3 prompts per step" in said
    resumed = run.trains(3)
    run.figure("complete, resumed with 1 training node instead of 3: trains", resumed["time"] - asked, START_S)
    assert resumed["step"] == steps + 1
    story = run.told_by("status")
    assert "COMPLETED; attempt 3 began " in story and f"as job {run.id}, from step {steps}" in story
    cancelled = time.time()
    run.cluster.slurm("scancel", run.id)
    run.figure("scancel of the demo: nodes free", run.freed() - cancelled, within=10)
    assert run.job.get_info()["State"] == "CANCELLED", run.story()
    assert run.left() == {}
    run.assert_nothing_lost_or_doubled(run.rows()[-1]["step"])
