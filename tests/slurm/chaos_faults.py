"""What can happen to a job at any moment, and what a person must read of it afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm_jobs import SlurmJob
from storage import Storage


@dataclass(frozen=True)
class Program:
    """A process of the job. `node`: as in the plan, "" for the job script and srun; `process`: a name of the plan."""

    host: str
    pid: int
    kind: str
    node: str
    process: str


@dataclass(frozen=True)
class Struck:
    """What was done, and what may come of it."""

    what: str
    states: tuple[str, ...] = ("COMPLETED",)
    """Ends that are right. A job that is complete with all its steps is right in any case."""
    says: str = ""
    """What the sentence of the end says where the job did not complete (a pattern)."""
    requeues: int = 0
    """Attempts that it may cost."""
    crashed: str = ""
    """Host of which nothing can be cleaned up."""
    at: float = 0.0


def programs(run: SlurmJob) -> list[Program]:
    """All processes of the job, on all nodes."""
    found = []
    for host in run.cluster.node_names:
        for pid, (name, line) in run.cluster.everything(host).items():
            with contextlib.suppress(OSError):
                if (each := _program(run, host, pid, name, line)) is not None:
                    found.append(each)
    return sorted(found, key=lambda each: (each.kind, each.host, each.pid))


def _program(run: SlurmJob, host: str, pid: int, name: str, line: str) -> Program | None:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    env = dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries)
    if env.get("HPC_GYM_JOB_ID", env.get("SLURM_JOB_ID")) != run.id or name.startswith("slurmstepd"):
        return None
    rank = env.get("SLURM_PROCID", "")
    node = run.plan.nodes[int(rank)].name if rank.isdigit() and "HPC_GYM_COORDINATOR" in env else ""
    if (process := env.get("HPC_GYM_PROCESS", "").split()[-1:]) and "HPC_GYM_NODE" in env:
        leads = os.getsid(pid) == pid
        kind = "child" if not leads else "rank" if process[0].startswith("rank") else "service"
        return Program(host, pid, kind, env["HPC_GYM_NODE"], process[0])
    if name == "slurm_script" or "-m hpc_gym.node.slurm_nodes" in line or "-m hpc_gym.node.attempt" in line:
        return Program(host, pid, "script", "", "script")
    if name == "srun":
        return Program(host, pid, "srun", "", "srun")
    if "submitit.core._submit" in line or "hpc_gym.node.slurm_task" in line:
        return Program(host, pid, "guardian", node, "supervisor")
    if "-m hpc_gym.node " in line:
        return Program(host, pid, "supervisor", node, "supervisor")
    return None


def says_of(program: Program) -> str:
    """What the end of a job says whose program was killed with SIGKILL."""
    node = f"node {program.node}, process"
    return {
        "script": "process job script was killed by SIGKILL|ended without an outcome",
        "srun": "process srun was killed by SIGKILL",
        "guardian": f"{node} supervisor .*(guardian|was killed by SIGKILL)",
        "supervisor": f"{node} supervisor was killed by SIGKILL",
        "service": f"{node} {program.process} was killed by SIGKILL",
        "rank": f"{node} {program.process} was killed by SIGKILL",
        "child": f"{node} {program.process} exited with code 1: RuntimeError: the loader of the data has died",
    }[program.kind]


class Faults:
    """The faults of one seed, on one job."""

    def __init__(self, rng: random.Random, run: SlurmJob, storage: Storage | None) -> None:
        self._rng = rng
        self._run = run
        self._storage = storage

    def strike(self, name: str) -> Struck:
        """Does what `name` says: a method here and its arguments, as `kill:srun`. Struck.at is when it began."""
        at, (method, *arguments) = time.time(), name.split(":")
        struck = getattr(self, method)(*arguments)
        assert isinstance(struck, Struck)
        return Struck(**{**vars(struck), "at": at})

    def kill(self, kind: str = "") -> Struck:
        program = self._choose(kind)
        if program is None:
            return Struck("kill: nothing of the job was there")
        _send(program, signal.SIGKILL)
        what = f"kill -9 {program}"
        if program.kind == "service":
            # It has one restart.
            return Struck(what, ("COMPLETED", "FAILED"), says_of(program))
        return Struck(what, ("FAILED",), says_of(program))

    def stop_and_continue(self, kind: str = "", seconds: str = "") -> Struck:
        span = float(seconds or self._rng.choice((2, 5, 14)))
        program = self._choose(kind)
        if program is None:
            return Struck("stop: nothing of the job was there")
        _send(program, signal.SIGSTOP)
        time.sleep(span)
        _send(program, signal.SIGCONT)
        # A supervisor that is stopped for longer than a node may be silent: its node is lost.
        lost = program.kind == "supervisor" and span > 8
        return Struck(f"SIGSTOP of {program} for {span:g} s", requeues=int(lost))

    def stop_for_good(self) -> Struck:
        program = self._choose("supervisor")
        if program is None:
            return Struck("stop: there was no supervisor")
        _send(program, signal.SIGSTOP)
        return Struck(f"SIGSTOP of {program}", requeues=1)

    def crash_node(self) -> Struck:
        hosts = sorted({program.host for program in programs(self._run)})
        if not hosts:
            return Struck("crash: the job has no node at this moment")
        host = self._rng.choice(hosts)
        self._run.cluster.crash(host)
        # Slurm requeues the leader of a heterogeneous job alone, where its node is the one.
        requeues = 2 if self._run.plan.launch.components else 1
        return Struck(f"crash of {host}", requeues=requeues, crashed=host)

    def kill_stepd(self, step: str = "") -> Struck:
        """Slurm's own process above the tasks of a node, or above the job script."""
        found = [
            (host, pid, line)
            for host in self._run.cluster.node_names
            for pid, (name, line) in self._run.cluster.everything(host).items()
            if name == "slurmstepd" and line.endswith(f".{step}]")
        ]
        if not found:
            return Struck("kill: there was no slurmstepd")
        host, pid, line = self._rng.choice(found)
        os.kill(pid, signal.SIGKILL)
        return Struck(f"kill -9 {line} on {host}", ("FAILED",), "was killed by SIGKILL|guardian", requeues=1)

    def slurmd(self) -> Struck:
        hosts = sorted({program.host for program in programs(self._run)}) or self._run.cluster.node_names
        host, seconds = self._rng.choice(hosts), self._rng.uniform(0.5, 5)
        self._run.cluster.kill_daemon(host, "slurmd")
        time.sleep(seconds)
        self._run.cluster.up()
        return Struck(f"slurmd of {host} away for {seconds:.1f} s", requeues=1)

    def slurmctld(self) -> Struck:
        seconds = self._rng.uniform(0.5, 6)
        self._run.cluster.kill_daemon("head", "slurmctld")
        time.sleep(seconds)
        self._run.cluster.up()
        return Struck(f"slurmctld away for {seconds:.1f} s", requeues=1)

    def scancel(self) -> Struck:
        self._run.cluster.slurm("scancel", self._run.id)
        return Struck("scancel", ("CANCELLED",), "CANCELLED")

    def scancel_a_component(self) -> Struck:
        component = self._rng.randrange(len(self._run.plan.launch.components) or 1)
        job = f"{self._run.id}+{component}" if self._run.plan.launch.components else self._run.id
        self._run.cluster.slurm("scancel", job)
        return Struck(f"scancel {job}", ("CANCELLED",), "CANCELLED")

    def cancel(self) -> Struck:
        self._run.job.cancel()
        return Struck("hpc-gym cancel", ("CANCELLED",), "CANCELLED")

    def requeue(self) -> Struck:
        said = _tried(lambda: self._run.cluster.slurm("scontrol", "requeue", self._run.id))
        return Struck(f"scontrol requeue {said}", requeues=1)

    def usr2(self) -> Struck:
        said = _tried(lambda: self._run.cluster.slurm("scancel", "--batch", "--signal=USR2", self._run.id))
        return Struck(f"USR2 to the batch script {said}", requeues=1)

    def usr1(self) -> Struck:
        said = _tried(lambda: self._run.cluster.slurm("scancel", "--batch", "--signal=USR1", self._run.id))
        return Struck(f"USR1 to the batch script {said}")

    def storage_hangs(self) -> Struck:
        seconds = self._rng.uniform(1, 12)
        if self._storage is None:
            return Struck("no file system of its own")
        with self._storage.hanging():
            time.sleep(seconds)
        return Struck(f"the file system hangs for {seconds:.1f} s")

    def _choose(self, kind: str) -> Program | None:
        """A process of the job: of that kind, or of a kind of which there are some at this moment."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found = programs(self._run)
            kinds = [kind] if kind else sorted({program.kind for program in found})
            kind_now = self._rng.choice(kinds) if kinds else ""
            if wanted := [program for program in found if program.kind == kind_now]:
                return self._rng.choice(wanted)
            time.sleep(0.05)
        return None


def _send(program: Program, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(program.pid, signum)


def _tried(command: Callable[[], str]) -> str:
    """What one of Slurm's commands said against it; "" where it did it."""
    try:
        command()
    except Exception as error:
        return f"({' '.join(str(error).split())})"
    return ""
