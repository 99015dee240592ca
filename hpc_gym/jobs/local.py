"""Jobs on this machine: `job.sh` in a session of its own, told apart from any later process with the same id.

A local job is requeued by nobody: an attempt that ends with "requeue" is followed by the next one inside the same job
(`hpc_gym.node.local_nodes`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.node import tree

JOB_ID = "HPC_GYM_JOB_ID"
"""Environment variable of the job script and what it starts, supervisors included."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Job scripts that this process started: kept so that they are reaped, and never waited for."""


def new_job_id() -> str:
    """A job id that no other local job of this machine has or will have."""
    now = time.time_ns()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now // 10**9))
    return f"local-{stamp}-{os.getpid()}-{now % 10**9 // 1000:06d}"


def start(run_dir: Path, job_id: str) -> ProcessIdentity:
    """Starts the job script of `run_dir`, detached: it outlives this process and its terminal."""
    environment = {**os.environ, JOB_ID: job_id}
    with (run_dir / "submitit" / f"{job_id}_0_log.out").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(run_dir / "job.sh")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run_dir,
            env=environment,
            start_new_session=True,
        )
    _children[process.pid] = process
    started = _start_time(process.pid)
    return ProcessIdentity(host=os.uname().nodename, boot=_boot_id(), pid=process.pid, started=started or 0)


def is_alive(process: ProcessIdentity) -> bool | None:
    """Whether that very process runs; None when it is one of another host, where only files can tell."""
    if process.host != os.uname().nodename:
        return None
    if process.boot != _boot_id():
        return False
    if (child := _children.get(process.pid)) is not None:
        child.poll()
    return _start_time(process.pid) == process.started


def terminate(record: JobRecord) -> bool:
    """Asks the job to stop in good order. Returns whether there was a process to ask.

    Raises UserError when the job runs on another host.
    """
    process = record.process
    alive = is_alive(process) if process else False
    if process is None or alive is False:
        return False
    if alive is None:
        raise UserError(f"job {record.job_id} runs on the host {process.host}: cancel it there")
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    return True


def processes(record: JobRecord) -> list[tree.Proc]:
    """This user's living processes on this host that belong to the job."""
    marks = {f"{JOB_ID}={record.job_id}".encode(), f"HPC_GYM_RUN_DIR={record.run_dir}".encode()}
    found = []
    for proc in tree.processes().values():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{proc.pid}/environ").read_bytes()
            if not proc.zombie and not marks.isdisjoint(environment.split(b"\0")):
                found.append(proc)
    return found


def kill(record: JobRecord, within_s: float = 5.0) -> list[tree.Proc]:
    """Ends every process of the job at once; returns those that would not die."""
    deadline = time.monotonic() + within_s
    while (living := processes(record)) and time.monotonic() < deadline:
        tree.send(living, signal.SIGKILL)
        time.sleep(0.05)
    return living


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when there is none, or only its zombie."""
    found = tree.process(pid)
    return None if found is None or found.zombie else found.start
