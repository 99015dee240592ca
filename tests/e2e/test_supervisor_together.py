"""Processes that can only live together, on several nodes: whichever ends, all are started again, once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_jobs
from small_jobs import FOREVER, Job, service, task

MakeJob = Callable[..., Job]
job = small_jobs.job
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

PARTS = ("vllm-0", "vllm-headless")


def parts(job: MakeJob, restarts: int) -> Job:
    """A job with one service in two parts, on a node each, beside one that has nothing to do with them."""
    first, second = (service(name, FOREVER, together="vllm", restarts=restarts) for name in PARTS)
    return job([first, service("gym", FOREVER)], [second], [task("rank-0", FOREVER)]).start()


def restarted(run: Job, times: int) -> bool:
    return all(len(run.events("started", name)) == times + 1 for name in PARTS)


@pytest.mark.parametrize("dies", PARTS)
def test_the_other_part_is_started_again_with_the_one_that_died(job: MakeJob, dies: str) -> None:
    run = parts(job, restarts=1)
    (other,) = {*PARTS} - {dies}
    before = {name: run.pid(name) for name in PARTS}
    os.kill(before[dies], signal.SIGKILL)
    run.until(lambda: restarted(run, 1))
    assert run.pid(other, life=1) != before[other]
    assert not Path(f"/proc/{before[other]}").exists()
    (told,) = run.events("restarting", other)
    assert told["cause"] == "another part of vllm has ended, and they can only live together"
    assert len(run.events("started", "gym")) == 1

    os.kill(run.pid(dies, life=1), signal.SIGKILL)
    assert run.wait() == 1
    assert (run.failure().process, run.failure().signal) == (dies, "SIGKILL")
    assert run.failure().cause.endswith("(after 1 restart)")


def test_parts_that_die_at_once_cost_one_restart(job: MakeJob) -> None:
    run = parts(job, restarts=2)
    for pid in [run.pid(name) for name in PARTS]:
        os.kill(pid, signal.SIGKILL)
    run.until(lambda: restarted(run, 1))
    time.sleep(1.5)
    assert restarted(run, 1)
    assert [len(run.events("restarting", name)) for name in PARTS] == [1, 1]
