"""What reaches sbatch of the shell that somebody submits from."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_plans import plan, task

from hpc_gym.jobs import slurm, slurm_check
from hpc_gym.plan.plan import Launch

OF_AN_ALLOCATION = ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "SBATCH_PARTITION")


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the variables come to lie that a stand-in for sbatch has, of a shell inside an allocation."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/said\necho 4711\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    for name in (*OF_AN_ALLOCATION, "SLURM_CONF", "MINE"):
        monkeypatch.setenv(name, "x")
    return tmp_path / "said"


def names(said: Path) -> set[str]:
    return {line.partition("=")[0] for line in said.read_text().splitlines()}


def test_a_job_that_is_submitted_inside_an_allocation_hears_nothing_of_it(said: Path, tmp_path: Path) -> None:
    assert slurm.submit(tmp_path) == "4711"
    assert names(said).isdisjoint(OF_AN_ALLOCATION)
    assert {"SLURM_CONF", "MINE", "PATH"} <= names(said)


def test_the_check_asks_sbatch_as_the_submit_does(said: Path, tmp_path: Path) -> None:

    slurm_check._test(plan(tmp_path, train=[[task("rank-0", "pass")]], launch=Launch(kind="slurm")))
    assert names(said).isdisjoint(OF_AN_ALLOCATION)
    assert {"SLURM_CONF", "MINE"} <= names(said)
