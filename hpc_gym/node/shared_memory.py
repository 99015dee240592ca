"""Files in /dev/shm that a node's processes leave behind when they are killed (vLLM, Ray, torch, multiprocessing).

Left there, they hold memory until the machine is restarted, and a later job may hang on them.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from hpc_gym.node.tree import Proc, processes

DIRECTORY = Path("/dev/shm")

# Names that libraries give. Only such a file may go when we never saw who made it: people keep data in /dev/shm, too.
_OF_LIBRARIES = re.compile(
    r"(psm_[0-9a-f]{8}|wnsm_[0-9a-f]+|sem\.mp-\w+|torch_\d+_.*|__KMP_REGISTERED_LIB_\d+.*|nccl-\w+|vllm.*|plasma.*|loky-.*|cuda\.shm\..*)"
)


class SharedMemory:
    """Watches /dev/shm for files of our processes. Call `look` now and then, and `remove` when they are dead."""

    def __init__(self, record: Path) -> None:
        """`record`: a file that keeps the names, for whoever cleans up if this process is killed."""
        self._record = record
        self._before = set(names())
        self._ours: set[str] = set()
        self._tries: dict[str, int] = {}
        self._since = time.time()

    def look(self, procs: Iterable[Proc]) -> None:
        """Finds out which new files `procs` have open or mapped. Cheap as long as nothing new appears."""
        new = {name for name in names() if name not in self._before and name not in self._ours}
        unknown = {name for name in new if self._tries.get(name, 0) < 5}
        if not unknown:
            return
        for name in unknown:
            self._tries[name] = self._tries.get(name, 0) + 1
        found = unknown & set(_in_use(proc.pid for proc in procs))
        if found:
            self._ours |= found
            with contextlib.suppress(OSError):
                self._record.write_text("\n".join(sorted(self._ours)))

    def remove(self) -> list[str]:
        """Removes what our dead processes left; returns the names."""
        return remove_left(self._ours, self._before, self._since)


def remove_left(ours: Iterable[str], before: Iterable[str], since: float) -> list[str]:
    """Removes from /dev/shm the files `ours`, and files of well-known libraries that are newer than `since` (seconds
    since the epoch) and not among `before`; never one that a living process uses.
    """
    known, old = set(ours), set(before)
    candidates = [name for name in names() if name in known or (name not in old and _is_stray(name, since))]
    if not candidates:
        return []
    used = set(_in_use(processes()))
    gone = []
    for name in candidates:
        if name not in used:
            with contextlib.suppress(OSError):
                (DIRECTORY / name).unlink()
                gone.append(name)
    return gone


def recorded(record: Path) -> list[str]:
    """The names that a `SharedMemory` recorded."""
    with contextlib.suppress(OSError):
        return record.read_text().splitlines()
    return []


def names() -> list[str]:
    try:
        return [path.name for path in DIRECTORY.iterdir()]
    except OSError:
        return []


def _is_stray(name: str, since: float) -> bool:
    with contextlib.suppress(OSError):
        status = (DIRECTORY / name).lstat()
        return bool(_OF_LIBRARIES.fullmatch(name)) and status.st_uid == os.getuid() and status.st_ctime >= since - 1
    return False


def _in_use(pids: Iterable[int]) -> Iterator[str]:
    """Names of files in /dev/shm that one of the processes has mapped or open.

    By inode: glibc's sem_open maps a semaphore under a temporary name before it links the one that others open, so
    that the mapping of a living semaphore reads `/dev/shm/sem.XXXXXX (deleted)`.
    """
    prefix = f"{DIRECTORY}/"
    by_inode: dict[int, str] = {}
    for name in names():
        with contextlib.suppress(OSError):
            by_inode[(DIRECTORY / name).lstat().st_ino] = name
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as maps:  # noqa: PTH123
            inodes = [int(line.split(None, 5)[4]) for line in maps if prefix in line]
            yield from (by_inode[inode] for inode in inodes if inode in by_inode)
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    target = str(Path(descriptor.path).readlink())
                    if target.startswith(prefix):
                        yield target.removeprefix(prefix)
