"""Which processes are ours, read from /proc, and how to make sure that none is left.

A process that leaves its group or session, or outlives its parent, stays below a supervisor: supervisors and their
guardians are child subreapers. Where even that chain is broken (several of them killed at once), the marker in the
environment tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MARKER = "HPC_GYM_PROCESS"
"""Environment variable of every process of a job: `JOB NODE PROCESS`."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Proc:
    """One row of /proc. (pid, start) names a process for ever, a pid alone does not."""

    pid: int
    parent: int
    group: int
    session: int
    start: int
    """Clock ticks since boot."""
    zombie: bool
    stopped: bool = False
    """By SIGSTOP or a debugger."""


def processes() -> dict[int, Proc]:
    """Every process of this machine that can be seen, by pid."""
    found = {}
    with os.scandir("/proc") as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for pid in pids:
        if (proc := process(pid)) is not None:
            found[pid] = proc
    return found


class ProcessTable:
    """`processes()`, read at most some twenty times a second however many ask: a large node has thousands of them."""

    def __init__(self) -> None:
        self._table: dict[int, Proc] = {}
        self._read_at = 0.0

    def recent(self) -> dict[int, Proc]:
        """Every process, as of at most 40 ms ago."""
        if time.monotonic() - self._read_at > 0.04:
            self._table, self._read_at = processes(), time.monotonic()
        return self._table


def process(pid: int) -> Proc | None:
    """The process with that pid, None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (many times a second)
            text = file.read()
    except OSError:
        return None
    # The name, in brackets, may hold anything.
    fields = text[text.rindex(b")") + 2 :].split()
    state = fields[0]
    parent, group, session, start = (int(fields[index]) for index in (1, 2, 3, 19))
    return Proc(pid, parent, group, session, start, state in (b"Z", b"X"), state in (b"T", b"t"))


def descendants(roots: Iterable[int], table: Mapping[int, Proc]) -> list[Proc]:
    """All living processes below those with the pids `roots`."""
    children: dict[int, list[Proc]] = {}
    for proc in table.values():
        children.setdefault(proc.parent, []).append(proc)
    found: list[Proc] = []
    queue = list(roots)
    while queue:
        below = children.get(queue.pop(), [])
        found.extend(proc for proc in below if not proc.zombie)
        queue.extend(proc.pid for proc in below)
    return found


def children(parent: int) -> list[Proc]:
    """The living children of a process."""
    return [proc for proc in processes().values() if proc.parent == parent and not proc.zombie]


def marked(marker: str, table: Mapping[int, Proc]) -> list[Proc]:
    """All living processes whose environment says that they belong to `marker` (a job, or `JOB NODE` and so on)."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for proc in table.values():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{proc.pid}/environ").read_bytes()
            if not proc.zombie and any(
                entry == wanted or entry.startswith(wanted + b" ") for entry in environment.split(b"\0")
            ):
                found.append(proc)
    return found


def send(procs: Iterable[Proc], signum: int) -> None:
    """Sends a signal to each, unless its pid is another process's by now."""
    for proc in procs:
        now = process(proc.pid)
        if now is not None and now.start == proc.start:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(proc.pid, signum)


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that the processes and the children they have waited for used so far."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_bytes()
            ticks += sum(int(field) for field in text[text.rindex(b")") + 2 :].split()[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def become_subreaper() -> None:
    """Orphans below this process become its children from now on. See prctl(2)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def signal_when_parent_dies(signum: int) -> None:
    """This process gets `signum` when the thread that made it ends. See prctl(2)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)


def kill_all(marker: str, spare: frozenset[int] = frozenset(), within_s: float = 5.0) -> list[int]:
    """Kills everything below this process, and everything marked, until nothing is left; returns pids that would not
    die.

    `spare`: pids that stay, with what is below them.
    """
    deadline = time.monotonic() + within_s
    while True:
        reap()
        left = list(ours(marker, spare))
        if not left or time.monotonic() > deadline:
            return [proc.pid for proc in left]
        send(left, signal.SIGKILL)
        time.sleep(0.02)


async def kill_all_async(marker: str, spare: frozenset[int], within_s: float) -> list[int]:
    """`kill_all` for a process that reaps its children elsewhere."""
    deadline = time.monotonic() + within_s
    while True:
        left = list(ours(marker, spare))
        if not left or time.monotonic() > deadline:
            return [proc.pid for proc in left]
        send(left, signal.SIGKILL)
        await asyncio.sleep(0.02)


def ours(marker: str, spare: frozenset[int] = frozenset()) -> Iterator[Proc]:
    """Living processes below this one or with the marker, this one not included."""
    table = processes()
    spared = {os.getpid(), *spare, *(proc.pid for proc in descendants(spare, table))}
    mine = {proc.pid: proc for proc in (*descendants([os.getpid()], table), *marked(marker, table))}
    yield from (proc for pid, proc in mine.items() if pid not in spared)


def reap() -> list[tuple[int, int]]:
    """Waits for every child that has ended: (pid, wait status) of each."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(found)
    return ended
