"""What a job keeps whatever happens to it: whole checkpoints and metrics, on storage that is full, hangs or is torn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from slurm_jobs import FOREVER, SlurmJob, outcome_of, resumed, service, task
from storage import Storage, storage

from hpc_gym.training.checkpoints import Checkpoints
from hpc_gym.training.metrics import read_lines

__all__ = ["storage"]

Submit = Callable[..., SlurmJob]

PREEMPTED_TOGETHER = ({"nodes": 1, "partition": "preempt"}, {"nodes": 2, "partition": "preempt", "gpus_per_node": 2})

# Steps with a metrics row and a checkpoint each, as the trainer makes them, with the trainer's own parts.
TRAINER = """
import os, sys, time
from pathlib import Path
from hpc_gym.protocol.notify import notify
from hpc_gym.training.checkpoints import Checkpoints
from hpc_gym.training.metrics import append_line
from hpc_gym.training.stopping import StopRequested, StopSignal

run_dir, attempt, stop = Path(os.environ['HPC_GYM_RUN_DIR']), int(os.environ['HPC_GYM_ATTEMPT']), StopSignal()
checkpoints = Checkpoints(run_dir / 'checkpoints', kept=1000)
checkpoints.remove_torn()
step = max((each.step for each in checkpoints.complete()), default=0)
print('resumed from', step, flush=True)

def train(kilobytes):
    global step
    step += 1
    append_line(run_dir / 'metrics.jsonl', {'attempt': attempt, 'step': step, 'max_steps': 1000, 'time': time.time()})
    save(kilobytes)

def save(kilobytes=8, seconds=0.0):
    notify(X_SAVING=1)
    folder = checkpoints.path(step)
    folder.mkdir(parents=True)
    (folder / 'weights').write_bytes(bytes([step % 256]) * 512 * kilobytes)
    time.sleep(seconds)
    with (folder / 'weights').open('ab') as file:
        file.write(bytes([step % 256]) * 512 * kilobytes)
    checkpoints.mark_complete(step, 1, step, 1.0)
    notify(X_SAVING=0)
"""


def job(submit: Submit, first: str, second: str = FOREVER, **how: object) -> SlurmJob:
    """A server and two ranks, of which the first one trains."""
    train = [[task("rank-0", TRAINER + first)], [task("rank-1", second)]]
    run = submit([service("server", FOREVER, restarts=1)], *train, **how)
    run.all_started()
    return run


def whole_checkpoints(run: SlurmJob) -> list[int]:
    """Steps of the checkpoints that would be resumed from; they hold what was written to them."""
    found = Checkpoints(run.run_dir / "checkpoints", kept=1000).complete()
    for each in found:
        weights = (each.path / "weights").read_bytes()
        assert len(weights) % 1024 == 0
        assert set(weights) == {each.step % 256}
    return [each.step for each in found]


def steps(run: SlurmJob) -> list[tuple[int, int]]:
    """(attempt, step) of the rows of metrics."""
    return [(row["attempt"], row["step"]) for row in read_lines(run.run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("components", [(), PREEMPTED_TOGETHER], ids=["plain", "heterogeneous"])
def test_a_job_preempted_in_the_middle_of_a_long_rollout_drops_it_saves_and_goes_on_at_the_saved_step(
    submit: Submit, components: tuple[dict[str, object], ...]
) -> None:
    rollouts = """
if attempt == 2:
    train(8)
    sys.exit(0)
train(8); train(8)
try:
    with stop.interruptible():
        print('a rollout of minutes', flush=True)
        time.sleep(600)
except StopRequested:
    step += 1
    save(seconds=2)
    sys.exit(85)
"""
    follower = """
import os, signal, sys, time
if os.environ['HPC_GYM_ATTEMPT'] == '2': sys.exit(0)
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))
while True: time.sleep(0.1)
"""
    run = job(submit, rollouts, follower, options={"partition": "preempt"}, components=components)
    run.said("train-0-rank-0", "a rollout of minutes")
    begin = time.time()
    run.cluster.slurm("sbatch", "-pgpu", "-N5", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
    stopped = outcome_of(run)["time"]
    run.figure("preempted in a rollout: saved and stopped", stopped - begin, within=15)
    resumed(run, "preempted", stopped)
    assert outcome_of(run)["kind"] == "requeue"
    assert {event["exit_code"] for event in run.events("exited", attempt=1) if event["role"] == "train"} == {85}
    run.said("train-0-rank-0", "resumed from 3", attempt=2)
    assert steps(run) == [(1, 1), (1, 2), (2, 4)]
    assert whole_checkpoints(run) == [1, 2, 3, 4]


def test_a_checkpoint_that_is_being_written_when_a_rank_of_another_node_is_killed_is_let_finish(
    submit: Submit,
) -> None:
    run = job(submit, "train(8); step += 1; print('saving', flush=True); save(seconds=4); time.sleep(600)")
    run.said("train-0-rank-0", "saving")
    killed = run.kill("train-1", "rank-1")
    run.figure("a rank killed while another node saves for 4 s: nodes free", run.freed() - killed, within=10 + 4)
    assert run.job.state == "FAILED"
    assert "node train-1, process rank-1 was killed by SIGKILL" in run.output().splitlines()[-1]
    assert whole_checkpoints(run) == [1, 2]


def test_a_checkpoint_that_never_ends_holds_the_nodes_for_its_bound_only(submit: Submit) -> None:
    run = job(submit, "train(8); step += 1; print('saving', flush=True); save(seconds=600)", checkpoint_grace_s=3.0)
    run.said("train-0-rank-0", "saving")
    killed = run.kill("train-1", "rank-1")
    run.figure("a rank killed while another node saves for ever: nodes free", run.freed() - killed, within=10 + 3)
    assert whole_checkpoints(run) == [1]


def test_a_checkpoint_torn_by_the_crash_of_its_node_is_not_resumed_from(submit: Submit) -> None:
    saves = """
if attempt == 2: sys.exit(0)
train(8); step += 1; print('saving', flush=True); save(seconds=600)
"""
    ends = "import os, sys, time\nif os.environ['HPC_GYM_ATTEMPT'] == '2': sys.exit(0)\ntime.sleep(600)"
    run = job(submit, saves, ends)
    run.said("train-0-rank-0", "saving")
    host, crashed = run.host("train-0"), time.time()
    run.cluster.crash(host)
    assert host not in resumed(run, "a node crashes while it saves", crashed)
    run.said("train-0-rank-0", "resumed from 1", attempt=2)
    assert whole_checkpoints(run) == [1]
    assert not (run.run_dir / "checkpoints" / "checkpoint-2").exists()


def test_on_a_full_file_system_the_job_fails_and_says_so_and_what_was_written_stays_whole(
    submit: Submit, storage: Storage
) -> None:
    fills = """
while not (run_dir / 'go').exists(): time.sleep(0.1)
while True: train(256)
"""
    run = job(submit, fills, folder=storage.path)
    storage.fill(leave=2 << 20)
    (run.run_dir / "go").touch()
    begin = time.time()
    run.figure("the shared file system is full: nodes free", run.freed() - begin, within=15)
    assert run.job.state == "FAILED"
    sentence = run.output().splitlines()[-1]
    assert sentence.startswith("FAILED: role train, node train-0, process rank-0 exited with code 1: OSError"), sentence
    assert "No space left on device" in sentence
    assert "No space left on device" in json.loads((run.run_dir / "failure.json").read_text())["cause"]
    assert run.events("outcome")[0]["kind"] == "failed"
    made = whole_checkpoints(run)
    assert made == list(range(1, len(made) + 1))
    assert len(made) >= 3
    rows = (run.run_dir / "metrics.jsonl").read_text()
    assert rows.endswith("\n")
    assert [json.loads(row)["step"] for row in rows.splitlines()][: len(made)] == made
    assert run.left() == {}


def test_a_job_that_begins_on_a_full_file_system_starts_nothing_and_blames_no_node(
    submit: Submit, storage: Storage
) -> None:
    run = submit([task("rank-0", FOREVER)], options={"begin": "now+1hour"}, folder=storage.path)
    storage.fill(leave=0)
    run.cluster.slurm("scontrol", "update", f"JobId={run.id}", "StartTime=now")
    run.freed()
    assert run.job.get_info()["State"] == "FAILED"
    storage.make_room()
    assert not run.events("started")
    assert not run.attempt(2).exists()


def test_a_file_system_that_hangs_costs_no_node_and_no_restart(submit: Submit, storage: Storage) -> None:
    trains = """
while not (run_dir / 'enough').exists(): train(8); time.sleep(0.5)
"""
    ends = "import os, time\nwhile not os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/enough'): time.sleep(0.1)"
    run = job(submit, trains, ends, folder=storage.path)
    run.until(lambda: len(steps(run)) > 2)
    with storage.hanging():
        # Its restart wants to write to its log.
        run.kill("rollout-0", "server")
        time.sleep(16)
        seen = steps(run)
    run.until(lambda: len(run.events("started", "server")) == 2)
    run.until(lambda: len(steps(run)) > len(seen) + 2)
    assert not run.events("silent")
    assert not run.events("outcome")
    (run.run_dir / "enough").touch()
    run.freed()
    assert run.job.state == "COMPLETED", run.story()
    assert whole_checkpoints(run) == [step for _, step in steps(run)] == list(range(1, len(steps(run)) + 1))
    assert not run.attempt(2).exists()


def test_a_job_that_ends_while_the_file_system_hangs_ends_when_it_is_back(submit: Submit, storage: Storage) -> None:
    ends = "import time; time.sleep(3)"
    run = job(submit, "time.sleep(3)", ends, folder=storage.path)
    with storage.hanging():
        time.sleep(11)
    run.freed()
    assert run.job.state == "COMPLETED", run.story()
    assert run.output().splitlines()[-1] == "COMPLETED"
