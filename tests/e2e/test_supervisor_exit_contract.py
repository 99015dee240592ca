"""The exit contract, promise by promise, on jobs of real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import pytest
import small_jobs
from small_jobs import FOREVER, Job, ended_within, service, task

MakeJob = Callable[..., Job]
job = small_jobs.job
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)"
# What Ray and NeMo Gym do: a grandchild in a session of its own whose parents are gone.
LEAVES_AN_ORPHAN = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(os.environ['TMPDIR'] + '/orphan', 'w').write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""
LEAVES_SHARED_MEMORY = """
import time
from multiprocessing import resource_tracker, shared_memory
block = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister('/' + block.name, 'shared_memory')
print('block', block.name)
time.sleep(600)
"""
EXITS_WITH_3 = "import time; time.sleep(1); raise SystemExit(3)"


def test_a_clean_end_stops_the_services_and_exits_with_0(job: MakeJob) -> None:
    run = job([service("server", FOREVER)], [task("rank-0", "print('done')")], [task("rank-1", "pass")]).start()
    marker = run.until(run.marker_if_known)
    assert run.wait() == 0
    assert run.output.splitlines()[-1] == "COMPLETED"
    assert run.outcome().kind == "completed"
    assert {event["node"] for event in run.events("released")} == {"rollout-0", "train-0", "train-1"}
    assert not (run.run_dir / "failure.json").exists()
    assert not (run.run_dir / "secrets").exists()
    assert run.left(marker) == []


def test_a_service_is_restarted_in_place_as_often_as_it_may_be_then_the_job_fails_and_says_why(job: MakeJob) -> None:
    crash = "import time; time.sleep(0.3); raise ValueError('no such tool')"
    run = job([service("gym", crash, restarts=2)], [task("rank-0", FOREVER)], [task("rank-1", FOREVER)]).start()
    marker = run.until(run.marker_if_known)
    assert run.wait() == 1
    assert [event["restarts"] for event in run.events("restarting", "gym")] == [1, 2]
    assert len({event["pid"] for event in run.events("started", "gym")}) == 3
    failure = run.failure()
    assert (failure.role, failure.node, failure.process, failure.exit_code) == ("rollout", "rollout-0", "gym", 1)
    assert failure.cause == "ValueError: no such tool (after 2 restarts)"
    assert run.output.splitlines()[-1] == (
        "FAILED: role rollout, node rollout-0, process gym exited with code 1: ValueError: no such tool"
        f" (after 2 restarts) (log: {run.run_dir}/attempts/1/logs/rollout-0-gym.log)"
    )
    assert run.left(marker) == []


def test_all_nodes_are_free_within_10_s_of_a_failing_task_even_where_children_ignore_sigterm(job: MakeJob) -> None:
    run = job(
        [service("deaf", IGNORES_SIGTERM, stop_grace_s=600.0)],
        [task("rank-0", EXITS_WITH_3)],
        [task("rank-1", IGNORES_SIGTERM)],
    ).start()
    marker = run.until(run.marker_if_known)
    assert run.wait() == 1
    failed = run.events("failed", "rank-0")[0]["time"]
    assert ended_within(run, failed, 10.0)
    failure = run.failure()
    assert (failure.role, failure.node, failure.process, failure.exit_code) == ("train", "train-0", "rank-0", 3)
    assert run.left(marker) == []


def test_a_killed_process_is_named_with_its_signal(job: MakeJob) -> None:
    run = job([service("vllm-0", FOREVER)], [task("rank-0", FOREVER)]).start()
    os.kill(run.pid("vllm-0"), signal.SIGKILL)
    assert run.wait() == 1
    assert (run.failure().process, run.failure().signal, run.failure().exit_code) == ("vllm-0", "SIGKILL", None)
    assert "process vllm-0 was killed by SIGKILL: from outside" in run.output.splitlines()[-1]


def test_a_service_that_ends_by_itself_is_a_failure(job: MakeJob) -> None:
    run = job([service("server", "pass")], [task("rank-0", FOREVER)]).start()
    assert run.wait() == 1
    assert run.failure().exit_code == 0
    assert run.failure().cause == "a service must live as long as the job does"


def test_the_first_cause_is_reported_and_not_what_followed_from_it(job: MakeJob) -> None:
    # The rank that lost its peer is faster to die than the one that failed is.
    victim = """
import os, time
while not os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/failing'):
    time.sleep(0.01)
raise RuntimeError('Connection closed by peer [10.0.0.2]:4711')
"""
    culprit = """
import os, time
open(os.environ['HPC_GYM_RUN_DIR'] + '/failing', 'w').close()
time.sleep(0.8)
raise KeyError('reward')
"""
    run = job([task("rank-0", victim)], [task("rank-1", culprit)]).start()
    assert run.wait() == 1
    assert (run.failure().process, run.failure().cause) == ("rank-1", "KeyError: 'reward'")


def test_what_double_forked_away_is_killed_too(job: MakeJob) -> None:
    run = job([service("ray", LEAVES_AN_ORPHAN)], [task("rank-0", "import time; time.sleep(2)")]).start()
    marker = run.until(run.marker_if_known)
    orphan = run.until(lambda: run.orphans(marker, "ray"))
    assert run.wait() == 0
    assert orphan
    assert run.left(marker) == []


def test_what_a_dead_service_left_is_killed_before_it_is_restarted(job: MakeJob) -> None:
    run = job([service("ray", LEAVES_AN_ORPHAN, restarts=1)], [task("rank-0", FOREVER)]).start()
    marker = run.until(run.marker_if_known)
    orphan = run.until(lambda: run.orphans(marker, "ray"))[0]
    time.sleep(1.2)
    os.kill(run.pid("ray"), signal.SIGKILL)
    assert run.pid("ray", life=1)
    assert orphan.pid not in {proc.pid for proc in run.alive(marker)}


def test_shared_memory_of_a_killed_process_is_removed(job: MakeJob) -> None:
    run = job(
        [service("vllm-0", LEAVES_SHARED_MEMORY, restarts=1)], [task("rank-0", "import time; time.sleep(3)")]
    ).start()
    marker = run.until(run.marker_if_known)
    name = run.until(lambda: run.shared_memory())[0]
    os.kill(run.pid("vllm-0"), signal.SIGKILL)
    assert run.wait() == 0
    assert name.startswith("psm_")
    assert run.left(marker) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_job_leaves_nothing(job: MakeJob, signum: signal.Signals) -> None:
    run = job(
        [service("vllm-0", LEAVES_SHARED_MEMORY), service("ray", LEAVES_AN_ORPHAN)],
        [task("rank-0", IGNORES_SIGTERM, stop_grace_s=1.0)],
        [task("rank-1", FOREVER)],
    ).start()
    marker = run.until(run.marker_if_known)
    run.until(lambda: run.orphans(marker, "ray") and run.shared_memory() and len(run.events("started")) == 4)
    assert run.process is not None
    sent = time.time()
    # Ctrl-C reaches the whole foreground group, a scheduler's SIGTERM the job's first process.
    (os.killpg if signum == signal.SIGINT else os.kill)(run.process.pid, signum)
    assert run.wait() == 130
    assert ended_within(run, sent, 10.0)
    assert run.outcome().reason == f"the job received {signum.name}"
    assert run.left(marker) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_supervisor_ends_the_job_and_leaves_nothing(job: MakeJob, rank: int) -> None:
    run = job(
        [service("vllm-0", LEAVES_SHARED_MEMORY), service("ray", LEAVES_AN_ORPHAN)],
        [service("deaf", IGNORES_SIGTERM), task("rank-0", LEAVES_AN_ORPHAN)],
        [task("rank-1", FOREVER)],
    ).start()
    marker = run.until(run.marker_if_known)
    run.until(lambda: run.orphans(marker, "ray") and run.orphans(marker, "rank-0") and run.shared_memory())
    time.sleep(1.2)
    killed = time.time()
    os.kill(run.supervisor(rank), signal.SIGKILL)
    assert run.wait() == 1
    assert time.time() - killed < 10
    failure = run.failure()
    assert (failure.node, failure.process, failure.signal) == (run.plan.nodes[rank].name, "supervisor", "SIGKILL")
    assert "process supervisor was killed by SIGKILL" in run.output.splitlines()[-1]
    assert run.left(marker) == []


def test_a_coordinator_that_is_killed_while_it_stops_the_job_does_not_hide_why(job: MakeJob) -> None:
    run = job([service("deaf", IGNORES_SIGTERM)], [task("rank-0", EXITS_WITH_3)]).start()
    marker = run.until(run.marker_if_known)
    run.until(lambda: run.events("stopping"))
    os.kill(run.supervisor(0), signal.SIGKILL)
    assert run.wait() == 1
    assert (run.failure().process, run.failure().exit_code) == ("rank-0", 3)
    assert run.left(marker) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("both", [False, True])
def test_a_killed_guardian_ends_the_job_and_leaves_nothing(job: MakeJob, rank: int, both: bool) -> None:
    run = job([service("ray", LEAVES_AN_ORPHAN)], [task("rank-0", LEAVES_AN_ORPHAN)], [task("rank-1", FOREVER)]).start()
    marker = run.until(run.marker_if_known)
    run.until(lambda: run.orphans(marker, "ray") and run.orphans(marker, "rank-0"))
    guardian, supervisor = run.guardian(rank), run.supervisor(rank)
    killed = time.time()
    os.kill(guardian, signal.SIGKILL)
    if both:
        os.kill(supervisor, signal.SIGKILL)
    assert run.wait() == 1
    assert time.time() - killed < 12
    assert (run.failure().node, run.failure().process) == (run.plan.nodes[rank].name, "supervisor")
    assert run.left(marker) == []


def test_a_killed_job_script_leaves_nothing(job: MakeJob) -> None:
    run = job([service("ray", LEAVES_AN_ORPHAN)], [task("rank-0", FOREVER)]).start()
    marker = run.until(run.marker_if_known)
    run.until(lambda: run.orphans(marker, "ray"))
    assert run.process is not None
    os.killpg(run.process.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while run.left(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.left(marker) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_whose_supervisor_is_stopped_is_given_up_and_the_next_attempt_follows(job: MakeJob, rank: int) -> None:
    second_time_well = "import os, time; time.sleep(0 if os.environ['HPC_GYM_ATTEMPT'] == '2' else 600)"
    run = job([service("server", FOREVER)], [task("rank-0", second_time_well)]).start()
    run.pid("rank-0")
    os.kill(run.supervisor(rank), signal.SIGSTOP)
    marker = run.marker()
    run.until(lambda: (run.run_dir / "attempts/2").exists(), 60)
    first = json.loads((run.run_dir / "attempts/1/outcome.json").read_text())
    assert (first["kind"], first["failure"]["node"]) == ("requeue", ["rollout-0", "train-0"][rank])
    assert "stopped by a signal for" in first["failure"]["cause"]
    assert run.wait() == 0
    assert run.left(marker) == []


def test_a_checkpoint_that_is_being_written_delays_the_stop(job: MakeJob) -> None:
    saves = """
import signal, sys, time
from hpc_gym.protocol.notify import notify
notify(X_SAVING=1)
time.sleep(3)
print('saved')
notify(X_SAVING=0)
time.sleep(600)
"""
    crash = "import time; time.sleep(1); raise SystemExit(4)"
    run = job([service("server", crash)], [task("rank-0", saves)]).start()
    assert run.wait() == 1
    assert run.failure().exit_code == 4
    assert "saved" in run.log("train-0-rank-0.log")
    assert run.events("saved", "rank-0")


def test_a_checkpoint_cannot_delay_the_stop_for_ever(job: MakeJob) -> None:
    saves = "import time; from hpc_gym.protocol.notify import notify; notify(X_SAVING=1); time.sleep(600)"
    run = job([service("server", "import time; time.sleep(1); raise SystemExit(4)")], [task("rank-0", saves)])
    run = run.start()
    assert run.wait() == 1
    assert ended_within(run, run.events("failed", "server")[0]["time"], 5.0 + 6.0)


STOPS_AT_A_CHECKPOINT = """
import os, signal, sys, time
def stop(*_):
    print('saving')
    sys.exit(85)
signal.signal(signal.SIGUSR2, stop)
print('training')
time.sleep(0 if os.environ['HPC_GYM_ATTEMPT'] == '2' else 600)
"""


def test_near_the_time_limit_tasks_stop_at_a_checkpoint_and_the_next_attempt_follows(job: MakeJob) -> None:
    run = job(
        [service("server", FOREVER)], [task("rank-0", STOPS_AT_A_CHECKPOINT)], [task("rank-1", STOPS_AT_A_CHECKPOINT)]
    ).start()
    assert run.process is not None
    run.until(lambda: all("training" in run.log_if_there(f"train-{k}-rank-{k}.log") for k in (0, 1)))
    run.process.send_signal(signal.SIGUSR2)
    assert run.wait() == 0
    first = json.loads((run.run_dir / "attempts/1/outcome.json").read_text())
    assert (first["kind"], first["reason"]) == ("requeue", "the job received SIGUSR2: its time limit is near")
    assert "saving" in (run.run_dir / "attempts/1/logs/train-1-rank-1.log").read_text()
    assert (run.run_dir / "attempts/latest").readlink().name == "2"
    assert run.outcome().kind == "completed"


def test_a_program_that_does_not_exist_is_named(job: MakeJob) -> None:
    from dataclasses import replace

    broken = replace(service("vllm-0", ""), argv=("/no/such/vllm", "serve"))
    run = job([broken], [task("rank-0", FOREVER)]).start()
    assert run.wait() == 1
    assert run.failure().process == "vllm-0"
    assert "it could not be started" in run.failure().cause
    assert "/no/such/vllm" in run.failure().cause
