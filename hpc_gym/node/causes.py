"""Reads from the end of a process's log why it died."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hpc_gym.protocol.log_lines import parse_line

_TAIL = 1 << 16
_LONGEST = 400
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit|Warning|Timeout|Refused)\b.*")
_TRACEBACK = "Traceback (most recent call last)"
_SRUN = ("srun: ", "slurmstepd: ")
_POINTS_ABOVE = "See stack trace (above) for the root cause"
"""What vLLM's API server says of its engine, which died before."""

# What torch (c10d's store, gloo, NCCL), DeepSpeed, aiohttp and our own client say when another process is gone. That is
# never the first cause.
_COLLATERAL = re.compile(
    r"closed by peer|connection (?:reset|refused|closed|was likely closed)|connection lost|broken pipe|peer closed"
    r"|remote process exited|no route to host|(?:network|host) is unreachable|server disconnected"
    r"|cannot connect to host|socketpollutils|recvValue failed|failed to recv, got 0 bytes"
    r"|client socket has (?:timed out|failed)|socket timeout|store->get|monitoredBarrier|pair closure"
    r"|timed out waiting \d+ ?ms for|\bgloo\b.*(?:timed out|timeout|pair|connect)"
    r"|NCCL.*(?:remote|unhandled system|timeout|aborted)|collective operation timeout"
    r"|DistBackendError|DistNetworkError|DistStoreError|rollout server \S+ is gone: not reached",
    re.IGNORECASE,
)


def cause_from_log(path: Path, unwritten: bytes = b"") -> str:
    """The exception that the last traceback in the log ends with, or the one before it that it points to; else the
    last line; "" when there is none. `unwritten`: what came after the log's end and found no room in it.
    """
    lines = last_lines(path) + _texts(unwritten.splitlines())
    # A container's srun writes its own words anywhere between those of the program.
    lines = [line for line in lines if not line.startswith(_SRUN)] or lines
    found = [text for number, line in enumerate(lines) if _TRACEBACK in line and (text := _exception(lines, number))]
    if found:
        return next((text for text in reversed(found) if _POINTS_ABOVE not in text), found[-1])[:_LONGEST]
    for line in reversed(lines):
        if _EXCEPTION.match(line):
            return line[:_LONGEST]
    return lines[-1][:_LONGEST] if lines else ""


def _exception(lines: Sequence[str], start: int) -> str:
    """What the traceback that begins at line `start` ends with, "" where that is missing."""
    # Prefixes such as "[rank1]: " or "(EngineCore pid=7) " stand before every line of a traceback.
    prefix = lines[start].partition(_TRACEBACK)[0]
    texts = (line.removeprefix(prefix) for line in lines[start + 1 :])
    return next((text for text in texts if text and not text[0].isspace()), "")


def last_lines(path: Path) -> list[str]:
    """The lines at the end of a log, without stamps and without empty ones."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            raw = file.read().splitlines()
    except OSError:
        return []
    if size > _TAIL:
        raw = raw[1:]
    return _texts(raw)


def _texts(raw: list[bytes]) -> list[str]:
    texts = (parse_line(line)[1].decode(errors="replace").rstrip() for line in raw)
    return [text for text in texts if text]


def is_collateral(cause: str) -> bool:
    """Whether the cause is what a process sees when another one has died."""
    return bool(_COLLATERAL.search(cause))
