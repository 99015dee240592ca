"""What a job asks of Slurm about itself, from its first node."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREEMPTED = "the job was preempted"
QUEUED_AGAIN = "Slurm queues the job again"

_STARTED_TOGETHER_S = 5.0
_CONTROLLER_MAY_BE_AWAY_S = 600.0
"""A controller that is restarted or replaced by its backup comes back; the running job waits for it as its nodes do."""
_ASK_AGAIN_S = 2.0
_TRIES = 3
_ENDED_BY = {"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL"}
"""What a job has ended as, by the reason that Slurm gives while its nodes are cleared."""
_KILL_WAIT_S = 30.0
_MOMENT = "%Y-%m-%dT%H:%M:%S"
_CANCELLED_WITHIN_S = 1.0
_NO_ANSWER = re.compile(
    r"unable to contact|socket timed out|connect failure|communication|zero bytes|temporarily|gave no answer"
    r"|transport endpoint|standby mode",
    re.IGNORECASE,
)
"""What Slurm's commands say when it is not the controller that answers."""


@dataclass(frozen=True)
class Standing:
    """How Slurm sees the job."""

    state: str
    """RUNNING, PENDING (it has been requeued), CANCELLED, TIMEOUT, ...; "" where Slurm could not be asked."""
    preempted: bool
    """Slurm has begun to take the nodes away for another job."""
    script_killed_by: str = ""
    """Name of the signal that has killed the job script, as "SIGKILL": then Slurm ends what is left of the job."""


def standing(job_id: str, within_s: float = _CONTROLLER_MAY_BE_AWAY_S) -> Standing:
    """How Slurm sees the job now; of a heterogeneous job, its leader, and whether any component is taken away.
    `within_s`: how long a controller that gives no answer is asked again.
    """
    text = _run(["scontrol", "--oneliner", "show", "job", job_id], within_s).stdout
    fields = dict(field.partition("=")[::2] for field in text.partition("\n")[0].split() if "=" in field)
    preempted = any(when not in ("None", "Unknown", "N/A") for when in re.findall(r"\bPreemptTime=(\S+)", text))
    # While its nodes are cleared a job is COMPLETING, whether it has ended or is queued again.
    queued_again = int(fields.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    state = "PENDING" if queued_again else fields.get("JobState", "")
    # What a running job is called while a signal is on its way to it, as that of a preemption.
    state = "RUNNING" if state == "SIGNALING" else state
    if state == "COMPLETING":
        # It has ended, and this job script is what it waits for.
        state = "PREEMPTED" if preempted else _ENDED_BY.get(fields.get("Reason", ""), state)
    ended = state not in ("PENDING", "RUNNING")
    return Standing(state, preempted, _killer(fields.get("ExitCode", "")) if ended else "")


def _killer(exit_code: str) -> str:
    """The signal in Slurm's `CODE:SIGNAL` of a job; "" without one, and for those by which Slurm ends a job itself."""
    number = int(exit_code.rpartition(":")[2] or 0) if re.fullmatch(r"\d+:\d+", exit_code) else 0
    known = {each.value: each.name for each in signal.Signals}
    return known.get(number, "") if number not in (signal.SIGHUP, signal.SIGTERM) else ""


def kill_wait(within_s: float) -> float:
    """Seconds from Slurm's SIGTERM to its SIGKILL; its default where it gives no answer within `within_s`."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", _run(["scontrol", "show", "config"], within_s).stdout, re.MULTILINE)
    return float(found[1]) if found else _KILL_WAIT_S


def has_outlived_its_leader(job_id: str) -> bool:
    """Whether another component of a heterogeneous job still runs since before its leader started.

    When the leader's node fails, Slurm (22.05) requeues the leader alone: its next life would find the others with
    their old steps, and perhaps be on one of their nodes. Components that start together have one start time.
    """
    text = _run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
    starts = [time.mktime(time.strptime(found, _MOMENT)) for found in re.findall(r"\bStartTime=(\d\S+)", text)]
    return len(starts) > 1 and starts[0] - min(starts) > _STARTED_TOGETHER_S


def leave_out(job_id: str, hosts: Sequence[str], sizes: Sequence[int]) -> None:
    """Lets a job that waits start on other nodes than `hosts`, and than those it was submitted without; says so where
    Slurm refuses, or where that would leave too few. `sizes`: numbers of nodes of its components.

    Slurm takes the list for a job that waits only. There is time: a job that was queued again starts after
    `cred_expire` seconds at the earliest, and its old script, which ignores SIGTERM, lives for KillWait seconds.
    """
    for told in _components(job_id) if hosts else []:
        address = f"{job_id}+{told['HetJobOffset']}" if "HetJobOffset" in told else job_id
        before = told.get("ExcNodeList", "(null)")
        without = ",".join(dict.fromkeys([*([] if before == "(null)" else [before]), *hosts]))
        partition, nodes = told.get("Partition", ""), sizes[int(told.get("HetJobOffset", "0"))]
        left = set(_run(["sinfo", "-hN", "-o", "%N", "-p", partition]).stdout.split()) - set(hostnames(without))
        if len(left) < nodes:
            # Slurm would hold it for ever (BadConstraints). It starts nothing on a node that is down anyway.
            print(f"job {address} may run on {', '.join(hosts)} again: {partition} has too few other nodes", flush=True)
            continue
        _exclude(address, without)


def _exclude(address: str, hosts: str) -> None:
    deadline = time.monotonic() + 5
    while refusal := update(address, {"ExcNodeList": hosts}):
        if time.monotonic() > deadline:
            print(f"job {address} waits, but not without {hosts}: {refusal}", flush=True)
            return
        time.sleep(0.2)


def _components(job_id: str) -> list[dict[str, str]]:
    """What Slurm says of each component of a job that is queued again; of a plain one, of itself."""
    lines = _run(["scontrol", "--oneliner", "show", "job", job_id]).stdout.splitlines()
    return [dict(field.partition("=")[::2] for field in line.split() if "=" in field) for line in lines]


def requeue(job_id: str) -> str:
    """Asks Slurm to queue the job again; why it refused, or "". Where Slurm has done so by itself, nothing is asked: it
    might hit the next attempt. An error may only mean that the controller is away: 22.05 then says "Unexpected message
    received".
    """
    if standing(job_id).state == "PENDING":
        return ""
    refusal = ""
    for _ in range(_TRIES):
        asked = _run(["scontrol", "requeue", job_id])
        if asked.returncode == 0:
            return ""
        if not refusal:
            print(f"scontrol requeue: {asked.stderr.strip()}: asking again once the controller answers", flush=True)
        refusal = asked.stderr.strip() or f"scontrol requeue exited with {asked.returncode}"
        if standing(job_id).state == "PENDING":
            return ""
        time.sleep(_ASK_AGAIN_S)
    return refusal


def cancel(job_ids: Sequence[str]) -> None:
    """Ends jobs as CANCELLED; those that have ended stay as they are."""
    _run(["scancel", *job_ids])


def cancel_own(job_id: str) -> None:
    """Ends the job that this process belongs to, and returns when Slurm has said so in the job's log."""
    cancel([job_id])
    # Nothing tells when: it comes with the SIGTERM to the batch script.
    time.sleep(_CANCELLED_WITHIN_S)


def fields(job_id: str) -> dict[str, str]:
    """What Slurm says of a job, or of one component by its own id; empty where it could not be asked."""
    return next((found for found in _components(job_id) if found.get("JobId") == job_id), {})


def time_left(job_id: str) -> float:
    """Seconds until the job's time limit, whoever changed it since; infinite where there is none, or nobody says."""
    try:
        return time.mktime(time.strptime(fields(job_id).get("EndTime", ""), _MOMENT)) - time.time()
    except ValueError:
        return math.inf


def update(job_id: str, changes: Mapping[str, str]) -> str:
    """Changes a job, or one component by its own id; why Slurm refused, or "".

    With SLURM_JOB_ID in its environment, scontrol writes scripts for a shell that lives through a change of the size.
    """
    command = ["env", "-u", "SLURM_JOB_ID", "-u", "SLURM_JOBID", "scontrol", "update", f"JobId={job_id}"]
    told = _run([*command, *(f"{name}={value}" for name, value in changes.items())])
    return "" if told.returncode == 0 else told.stderr.strip() or f"scontrol update exited with {told.returncode}"


def hostnames(nodes: str) -> list[str]:
    """The nodes of a list in Slurm's spelling, as `node[1-3]`."""
    return _run(["scontrol", "show", "hostnames", nodes]).stdout.split()


def _run(command: list[str], within_s: float = _CONTROLLER_MAY_BE_AWAY_S) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands, again and again for `within_s` while it is not the controller that answers."""
    deadline = time.monotonic() + within_s
    said = False
    while _has_no_answer(done := _once(command)) and time.monotonic() < deadline:
        if not said:
            print(f"{command[0]}: {done.stderr.strip()}: asking again once the controller answers", flush=True)
        said = True
        time.sleep(_ASK_AGAIN_S)
    return done


def _has_no_answer(done: subprocess.CompletedProcess[str]) -> bool:
    """Where this process reaps orphans, the exit code of a command may be lost and read as 0: then it said nothing."""
    if done.returncode != 0:
        return bool(_NO_ANSWER.search(done.stderr))
    return "show" in done.args and not done.stdout


def _once(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} gave no answer within 30 s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
