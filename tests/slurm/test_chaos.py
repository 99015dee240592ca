"""Random faults at random moments of a job: whatever happens, it goes on or ends, leaves nothing, and tells the truth.

A seed gives one job, one moment and one or two faults. HPC_GYM_CHAOS_SEEDS="5,17,100-120" chooses seeds; a failing test
says how it is run again, which is the same only as far as the machine's timing is.
HPC_GYM_CHAOS_EVENT="saving/kill:srun,crash_node" chooses moment and faults.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_faults import Faults, Struck
from chaos_job import STEPS, first_failure, rows, saving, submitted, wrong_with_the_steps
from slurm_jobs import SlurmJob
from storage import Storage, storage

__all__ = ["storage"]

Submit = Callable[..., SlurmJob]

FAULTS = {
    "kill": 10,
    "stop_and_continue": 5,
    "stop_for_good": 1,
    "crash_node": 3,
    "slurmd": 2,
    "slurmctld": 2,
    "scancel": 2,
    "scancel_a_component": 1,
    "cancel": 1,
    "requeue": 2,
    "usr2": 2,
    "usr1": 1,
    "storage_hangs": 2,
}
"""Each with its weight."""
MOMENTS = {
    "queued": 1,
    "script": 3,
    "joining": 2,
    "started": 2,
    "training": 5,
    "saving": 4,
    "stopping": 2,
    "again": 3,
}
USUAL = [(11, "training/kill:script"), (12, "saving/kill:srun"), (3, "script/kill:guardian"), (27, "")]
"""What nothing but the job's own watch tells of, and a seed with two faults."""
FREED_WITHIN_S = 25.0
"""The promise is 10 s, and 5 s more for a checkpoint that is being written: tests elsewhere hold the job to that. Here
also while it starts up, two things happen at once and the machine is busy.
"""
OURS = re.compile(r'File "[^"]*/hpc_gym/(?:node|jobs|cli|protocol|plan)/')
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def chosen() -> list[tuple[int, str]]:
    """(seed, event or "") of each test."""
    wanted, event = os.environ.get("HPC_GYM_CHAOS_SEEDS"), os.environ.get("HPC_GYM_CHAOS_EVENT", "")
    if not wanted:
        return [(11, event)] if event else USUAL
    found: list[tuple[int, str]] = []
    for part in wanted.split(","):
        first, _, last = part.partition("-")
        found += [(seed, event) for seed in range(int(first), int(last or first) + 1)]
    return found


@pytest.mark.parametrize("seed, event", chosen())
def test_whatever_happens_a_job_goes_on_or_ends_leaves_nothing_and_tells_the_truth(
    submit: Submit, seed: int, event: str, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(seed)
    heterogeneous = rng.random() < 0.35
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    names = rng.choices(list(FAULTS), list(FAULTS.values()), k=1 if rng.random() < 0.75 else 2)
    if event:
        moment, _, faults_of_it = event.partition("/")
        names = faults_of_it.split(",")
    slow: Storage | None = request.getfixturevalue("storage") if "storage_hangs" in names else None
    run = submitted(submit, heterogeneous, slow.path if slow else None)
    before = left_in_folders(run)
    requeues = wait_for(moment, run, rng)
    faults, struck = Faults(rng, run, slow), []
    for name in names:
        struck.append(faults.strike(name))
        time.sleep(rng.uniform(0, 2) if len(names) > 1 else 0)
    story = f"seed {seed}: {'heterogeneous' if heterogeneous else 'plain'}, {moment}: " + "; ".join(
        each.what for each in struck
    )
    print(story, flush=True)
    wrong = [] if "Traceback" not in (said := hpc_gym(run, "status")) else [said]
    wrong += judge(run, struck, requeues, before)
    print("\n".join(wrong), flush=True)
    again = f"HPC_GYM_CHAOS_SEEDS={seed} HPC_GYM_CHAOS_EVENT={event} pytest -m slurm tests/slurm/test_chaos.py"
    assert not wrong, "\n".join([story, again, "", *wrong, "", run.story(), *logs_of(run)])


def wait_for(moment: str, run: SlurmJob, rng: random.Random) -> int:
    """Waits for a moment of the job; how many requeues that took."""
    if moment == "queued":
        time.sleep(rng.uniform(0, 1))
    elif moment == "script":
        run.until((run.run_dir / "attempts" / "1").exists)
        time.sleep(rng.uniform(0, 4))
    elif moment == "joining":
        run.until(lambda: run.events("joined"))
        time.sleep(rng.uniform(0, 1))
    elif moment == "started":
        run.all_started()
        time.sleep(rng.uniform(0, 1))
    elif moment in ("training", "saving"):
        wanted = rng.randint(1, STEPS - 2)
        run.until(lambda: len(rows(run)) >= wanted and (moment == "training" or saving(run)))
        time.sleep(rng.uniform(0, 0.4))
    elif moment == "stopping":
        run.until(lambda: any(step == STEPS for _, step in rows(run)))
        time.sleep(rng.uniform(0, 2.5))
    elif moment == "again":
        run.until(lambda: len(rows(run)) >= 2)
        run.cluster.slurm("scontrol", "requeue", run.id)
        run.until((run.run_dir / "attempts" / "2").exists)
        time.sleep(rng.uniform(0, 5))
        return 1
    return 0


def judge(run: SlurmJob, struck: list[Struck], requeues: int, before: set[str]) -> list[str]:
    """What is wrong with how the job ended."""
    state = str(run.until(lambda: (found := run.job.state) in ENDED and found, 2 * run.patience))
    freed = run.freed(60)
    wrong = []
    allowed = {state for each in struck for state in each.states} | {"COMPLETED"}
    if state not in allowed:
        wrong.append(f"it is {state}, and should be one of {sorted(allowed)}")
    begun = max(each.at for each in struck)
    if state != "COMPLETED" and not any(each.requeues for each in struck) and freed - begun > FREED_WITHIN_S:
        wrong.append(f"its nodes were free after {freed - begun:.1f} s")
    attempts = [int(each.name) for each in (run.run_dir / "attempts").glob("[0-9]*")]
    if len(attempts) > 1 + requeues + sum(each.requeues for each in struck):
        wrong.append(f"it took {len(attempts)} attempts")
    crashed = {each.crashed for each in struck}
    run.cluster.up()
    if left := {host: found for host, found in run.left().items() if host not in crashed}:
        wrong.append(f"processes are left: {left}")
    if folders := {each for each in left_in_folders(run) - before if each.partition(":")[0] not in crashed}:
        wrong.append(f"files are left: {sorted(folders)}")
    if not run.events("outcome"):
        # It was ended before there was anybody to clean up.
        run.job.cancel()
    if (run.run_dir / "secrets").exists():
        wrong.append(f"secrets are left: {[each.name for each in (run.run_dir / 'secrets').iterdir()]}")
    return wrong + wrong_with_the_steps(run, state == "COMPLETED") + wrong_with_the_words(run, state, struck)


def wrong_with_the_words(run: SlurmJob, state: str, struck: list[Struck]) -> list[str]:
    """What a person reads of it and should not, or does not and should."""
    status = json.loads(hpc_gym(run, "status", "--json"))
    sentence, wrong = str(status["outcome"]), []
    if status["state"] != state or not sentence.startswith(state):
        wrong.append(f"status says {status['state']}, {sentence}; it is {state}")
    if state != "COMPLETED" and not any(each.says and re.search(each.says, sentence) for each in struck):
        wrong.append(f"the sentence {sentence!r} does not name the cause: {[each.says for each in struck]}")
    failure = first_failure(run)
    if (state == "FAILED" and "without an outcome" not in sentence) != bool(failure):
        wrong.append(f"{state}, and failure.json is {failure}")
    if failure and (missing := [name for name in ("role", "node", "process", "log") if not failure[name]]):
        wrong.append(f"failure.json lacks {missing}: {failure}")
    if failure and not Path(failure["log"]).exists():
        wrong.append(f"failure.json names a log that is not there: {failure['log']}")
    for command in (("status",), ("logs", "--errors"), ("list",)):
        said = hpc_gym(run, *command)
        if "Traceback" in said and (command[0] != "logs" or OURS.search(said)):
            wrong.append(f"hpc-gym {' '.join(command)} shows\n{said}")
    return wrong


def hpc_gym(run: SlurmJob, command: str, *options: str) -> str:
    """What a command says of the job."""
    job = [] if command == "list" else [str(run.run_dir)]
    state = {"HPC_GYM_RUNS": str(run.run_dir.parent), "XDG_STATE_HOME": str(run.run_dir.parent / "state")}
    done = subprocess.run(
        [sys.executable, "-m", "hpc_gym.cli.main", command, *job, *options],
        env={**os.environ, **state},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def left_in_folders(run: SlurmJob) -> set[str]:
    """`HOST:PATH` of what jobs may leave on the nodes: private directories and shared memory."""
    found = set()
    for host in run.cluster.node_names:
        listed = run.cluster.on(host, "sh", "-c", "ls -d /tmp/hg-* /dev/shm/* 2>/dev/null").stdout.split()
        found |= {f"{host}:{path}" for path in listed}
    return found


def logs_of(run: SlurmJob) -> list[str]:
    """The ends of all logs of supervisors."""
    found = sorted(run.run_dir.glob("attempts/*/logs/*supervisor*"))
    return [f"--- {path}\n{path.read_text()[-2000:]}" for path in found]
