"""The test cluster is a cluster: nodes of their own, faults that look like faults, nothing left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster import Cluster


def test_nodes_have_hosts_addresses_and_loopbacks_of_their_own(slurm_cluster: Cluster) -> None:
    seen = slurm_cluster.slurm(
        "srun", "-N5", "-n5", "sh", "-c", "echo $(hostname) $(hostname -i) $CUDA_VISIBLE_DEVICES"
    )
    lines = sorted(line.split() for line in seen.splitlines())
    assert [line[0] for line in lines] == ["node1", "node2", "node3", "node4", "node5"]
    assert len({line[1] for line in lines}) == 5


def test_tmp_is_private_and_shared_is_shared(slurm_cluster: Cluster, shared: Path) -> None:
    slurm_cluster.on("node1", "sh", "-c", f"echo one > /tmp/here; echo two > {shared}/there")
    assert slurm_cluster.on("node2", "cat", "/tmp/here").returncode != 0
    assert slurm_cluster.on("node2", "cat", f"{shared}/there").stdout == "two\n"


def test_a_crashed_node_is_down_and_comes_back(slurm_cluster: Cluster) -> None:
    slurm_cluster.crash("node5")
    # Slurm asks its nodes every third of the time-out, and has taken up to 1.7 times of it.
    deadline = time.monotonic() + 26 + 2 * slurm_cluster.settings().slurmd_timeout
    while "down" not in slurm_cluster.slurm("sinfo", "-h", "-n", "node5", "-o", "%T"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    slurm_cluster.up()
    assert slurm_cluster.on("node5", "hostname").stdout == "node5\n"


@pytest.mark.parametrize("command", ["scancel", "end"])
def test_no_process_outlives_its_job(slurm_cluster: Cluster, command: str) -> None:
    wait = "sleep 60" if command == "scancel" else "true"
    job = slurm_cluster.slurm(
        "sbatch", "--parsable", "-o", "/dev/null", "--wrap", f"setsid sleep 61 & sleep 1; {wait}"
    ).strip()
    deadline = time.monotonic() + 30
    while "sleep 61" not in slurm_cluster.processes("node1").values():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if command == "scancel":
        slurm_cluster.slurm("scancel", job)
    while slurm_cluster.processes("node1"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
