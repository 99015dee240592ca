from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

from hpc_gym.node import tree
from hpc_gym.node.shared_memory import DIRECTORY, SharedMemory, recorded

MAKER = """
import sys, time
from multiprocessing import resource_tracker, shared_memory
block = shared_memory.SharedMemory(name=sys.argv[1], create=True, size=4096)
resource_tracker.unregister('/' + block.name, 'shared_memory')
print('made', flush=True)
time.sleep(600)
"""


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names of shared memory; what is left of it is removed."""
    stem = f"hpcgymtest-{time.time_ns()}"
    found = [f"{stem}-{k}" for k in range(3)]
    yield found
    for name in found:
        (DIRECTORY / name).unlink(missing_ok=True)


def maker(name: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", MAKER, name], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_what_our_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path, names: list[str]) -> None:
    memory = SharedMemory(tmp_path / "record")
    ours, alive = maker(names[0]), maker(names[1])
    (DIRECTORY / names[2]).write_text("somebody's data")
    procs = [proc for pid in (ours.pid, alive.pid) if (proc := tree.process(pid))]
    memory.look(procs)
    for child in (ours,):
        child.kill()
        child.communicate()
    assert names[0] in memory.remove()
    assert not (DIRECTORY / names[0]).exists()
    assert (DIRECTORY / names[1]).exists(), "a living process uses it"
    assert (DIRECTORY / names[2]).exists(), "nobody of ours made it"
    assert set(names[:2]) <= set(recorded(tmp_path / "record"))
    alive.kill()
    alive.communicate()


def test_a_librarys_file_is_removed_even_if_its_maker_was_never_seen(tmp_path: Path) -> None:
    memory = SharedMemory(tmp_path / "record")
    block = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(f"/{block.name}", "shared_memory")
    block.close()
    assert block.name in memory.remove()
