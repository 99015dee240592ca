"""Errors of GPUs (Xid) that the kernel's log of a node tells of, where a user may read it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator

_LOG = "/dev/kmsg"
_RECENT_S = 3600.0
"""A GPU that failed before has mostly been reset since, or its node drained."""
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
# Those after which a GPU or its link is to be reset or replaced: NVIDIA, "Xid Errors", catalogue of r570.
_FATAL = {
    48: "double-bit ECC error",
    62: "its microcontroller halted",
    64: "a row of memory could not be remapped",
    74: "NVLink error",
    79: "it has fallen off the bus",
    95: "uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
}


def xid_errors() -> Iterator[str]:
    """The fatal errors of the last hour, a line each; none where the log may not be read."""
    try:
        log = os.open(_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        yield from fatal(_records(log), time.clock_gettime(time.CLOCK_MONOTONIC))
    finally:
        os.close(log)


def _records(log: int) -> Iterator[str]:
    """Each read is a record; one that was overwritten meanwhile (EPIPE) is passed over. See /dev/kmsg, Linux ABI."""
    while True:
        try:
            yield os.read(log, 8192).decode(errors="replace")
        except BrokenPipeError:
            continue
        except OSError:
            return


def fatal(records: Iterable[str], now_s: float) -> Iterator[str]:
    """What records of the form `priority,sequence,microseconds,flags;text` tell of GPUs, `now_s` seconds after boot."""
    told = set()
    for record in records:
        found = _XID.search(record)
        if found is None or int(found[2]) not in _FATAL:
            continue
        try:
            age = now_s - int(record.split(",")[2]) / 1e6
        except (IndexError, ValueError):
            continue
        line = f"GPU at {found[1]} had Xid {found[2]}: {_FATAL[int(found[2])]}"
        if age <= _RECENT_S and line not in told:
            told.add(line)
            yield line
