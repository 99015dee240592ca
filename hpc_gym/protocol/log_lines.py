"""The log files of a job: their names, and the form of their lines.

A process of the plan has one file, `attempts/K/logs/ROLE-NODE-PROCESS.log`, with its stdout and stderr. Every line is

    2026-11-20T12:50:11.123456Z TEXT

that is, the moment (UTC, microseconds) at which the node's supervisor read it, always `STAMP_LENGTH` bytes, a space,
and what the process wrote, byte for byte. Lines that were read at once carry the same stamp. A carriage return (a
progress bar) ends a line too. A process that is restarted in place goes on in the same file.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

STAMP_LENGTH = 27


def log_name(role: str, node: str, process: str) -> str:
    """`ROLE-NODE-PROCESS.log`, where NODE is the node's index, or its whole name where the node is of another role.

    >>> log_name("train", "train-1", "rank-1")
    'train-1-rank-1.log'
    >>> log_name("judge", "rollout-0", "judge-0")
    'judge-rollout-0-judge-0.log'
    """
    return f"{role}-{node.removeprefix(role + '-')}-{process}.log"


def parse_log_name(name: str) -> tuple[str, str, str] | None:
    """(role, node, process) of the name of a log file; None for the name of another file."""
    match = re.fullmatch(r"([a-z]+)-(?:([a-z]+)-)?(\d+)-(.+)\.log", name)
    if match is None:
        return None
    role, other, index, process = match.groups()
    return role, f"{other or role}-{index}", process


def stamp(seconds: float) -> bytes:
    """The prefix of lines read at `seconds` since the epoch, its space included."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S.%fZ} ".encode()


def has_stamp(line: bytes) -> bool:
    """Whether a line begins with what looks like a stamp."""
    return line[STAMP_LENGTH - 1 : STAMP_LENGTH + 1] == b"Z "


def parse_line(line: bytes) -> tuple[float, bytes]:
    """(seconds since the epoch, text) of a line without its line end; (0.0, line) where it has no stamp."""
    if not has_stamp(line):
        return 0.0, line
    try:
        moment = datetime.fromisoformat(line[:STAMP_LENGTH].decode())
    except ValueError:
        return 0.0, line
    return moment.timestamp(), line[STAMP_LENGTH + 1 :]
