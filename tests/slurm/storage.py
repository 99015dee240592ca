"""A small file system of its own that the login node and all nodes see, and that can be filled up or made to hang."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster


@dataclass(frozen=True)
class Storage:
    """An ext4 in a file, mounted at the same place on all hosts."""

    path: Path

    def fill(self, leave: int) -> None:
        """Takes all room but about `leave` bytes."""
        with (self.path / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while self._free() > leave:
                file.write(bytes(min(1 << 20, self._free() - leave)))

    def _free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_bsize

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """In here whoever writes to it waits, as where a file server does not answer. Reads go on."""
        subprocess.run(["fsfreeze", "--freeze", self.path], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self.path], check=True)


@pytest.fixture
def storage(slurm_cluster: Cluster, shared: Path) -> Iterator[Storage]:
    """64 MiB. Skips where the machine has no loop devices."""
    image, path = shared / "image", shared / "small"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    looped = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True)
    if looped.returncode != 0:
        pytest.skip(f"no file system can be made in a file here: {looped.stderr.strip()}")
    device = looped.stdout.strip()
    try:
        subprocess.run(["mount", device, path], check=True)
        for node in slurm_cluster.node_names:
            mounted = slurm_cluster.on(node, "mount", device, str(path))
            assert mounted.returncode == 0, mounted.stderr
        yield Storage(path)
    finally:
        slurm_cluster.cancel_all()
        for node in slurm_cluster.node_names:
            slurm_cluster.on(node, "umount", "-l", str(path))
        subprocess.run(["umount", "-l", path], check=False)
        subprocess.run(["losetup", "--detach", device], check=False)
