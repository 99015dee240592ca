"""Private directories that nobody could clean up after: their node crashed, or a supervisor and the guardian above it
were killed together. The next job of the same user on that node does it.

Both hold a lock in the directory for as long as they live, and the kernel takes it from the dead: no pid that another
process may have by now, and no clock, has to tell whether somebody is still there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from hpc_gym.node import shared_memory, tree

SHARED_MEMORY_RECORD = "shared_memory"
"""File in a private directory: names of what its processes have in /dev/shm."""
_LOCK = "lock"
_NAME = re.compile(r"hg-[0-9a-f]{10}")
_held: list[int] = []


def hold(private_dir: Path) -> None:
    """Shows others, as long as this process lives, that the directory is in use. Programs started later do not."""
    lock, new = private_dir / _LOCK, private_dir / f".{_LOCK}-{os.getpid()}"
    # Locked before it has its name: it never lies there without a lock while its first holder lives.
    descriptor = _locked(os.open(new, os.O_RDWR | os.O_CREAT, 0o600))
    try:
        os.link(new, lock)
    except FileExistsError:
        os.close(descriptor)
        descriptor = _locked(os.open(lock, os.O_RDWR))
    finally:
        new.unlink()
    _held.append(descriptor)


def _locked(descriptor: int) -> int:
    with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def remove_left_behind(folder: Path) -> list[Path]:
    """Kills and removes what dead jobs of this user left in and of their private directories below `folder`; returns
    the directories.
    """
    removed = []
    for directory in _ours(folder):
        with _alone_in(directory) as alone:
            if alone:
                tree.send(_working_in(directory), signal.SIGKILL)
                names = shared_memory.recorded(directory / SHARED_MEMORY_RECORD)
                shared_memory.remove_left(names, shared_memory.names(), time.time())
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory)
    return removed


def _ours(folder: Path) -> Iterator[Path]:
    for path in folder.glob("hg-*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
            if private and status.st_uid == os.getuid() and _NAME.fullmatch(path.name):
                yield path


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[bool]:
    """Whether nobody else holds the directory. One without the file of the lock may be of a job that has just begun, or
    of an hpc-gym that had none.
    """
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.fstat(descriptor).st_nlink > 0
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        os.close(descriptor)


def _working_in(directory: Path) -> Iterator[tree.Proc]:
    """Processes of the job: each has the directory for its temporary files."""
    wanted = f"TMPDIR={directory}".encode()
    for proc in tree.processes().values():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{proc.pid}/environ").read_bytes().split(b"\0"):
                yield proc
