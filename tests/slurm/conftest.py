"""A real Slurm for these tests: one per session, stopped at its end; skipped, with the reason, where it cannot be."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cluster"))
from cluster import Cluster
from machine import why_not

HERE = Path(__file__).parent
SETTINGS = {"requeue_wait": 5, "slurmd_timeout": 20}
"""Where nothing is lost by a shorter wait than that of a cluster that somebody looks at; and a job notices before Slurm
that a node is gone, as on any real cluster.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[Cluster]:
    """The cluster of this test session.

    With HPC_GYM_REQUIRE_SLURM=1 a machine that cannot have one fails the tests. HPC_GYM_SLURM_SETTINGS changes its
    `Settings`, as to production timers: '{"kill_wait": 30, "slurmd_timeout": 300}'.
    """
    reason = why_not()
    if reason and os.environ.get("HPC_GYM_REQUIRE_SLURM") != "1":
        pytest.skip(f"no Slurm cluster: {reason}")
    # Ended from outside, as by a time limit of CI, the tests still clean up and say what they found.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM"))
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="hpc-gym-slurm-")), attached=True)
    try:
        cluster.up(**SETTINGS | json.loads(os.environ.get("HPC_GYM_SLURM_SETTINGS", "{}")))
        yield cluster
    finally:
        cluster.down(purge=True)


@pytest.fixture
def slurm_cluster(slurm_session: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, whole and idle before and after a test; Slurm's commands in this process talk to it."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm_session.env["SLURM_CONF"])
    slurm_session.up()
    yield slurm_session
    # A crashed node first: without it, its job ends only when Slurm gives the node up.
    slurm_session.up()
    slurm_session.cancel_all()


@pytest.fixture
def shared(slurm_cluster: Cluster) -> Path:
    """A new folder on the cluster's shared file system."""
    return Path(tempfile.mkdtemp(dir=slurm_cluster.shared))


from secrecy import planted  # noqa: E402, F401 (a fixture)
from slurm_jobs import submit  # noqa: E402, F401 (a fixture)
