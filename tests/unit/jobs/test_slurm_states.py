"""The state of a job as squeue says it, as sacct does once squeue has forgotten it, and where neither is there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpc_gym.jobs import slurm

Commands = Path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """A folder that is first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def says(commands: Commands, name: str, text: str, before: str = "") -> None:
    program = commands / name
    program.write_text(f"#!/bin/sh\n{before}\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("queue", "state"),
    [
        ("7|RUNNING|2026-11-20T10:00:00|None", "RUNNING"),
        ("7|COMPLETING|2026-11-20T10:00:00|None", "RUNNING"),
        ("7|REQUEUE_HOLD|N/A|JobHeldUser", "PENDING"),
        ("7+0|COMPLETED|x|None\n7+1|COMPLETED|x|None", "COMPLETED"),
        ("7+0|COMPLETED|x|None\n7+1|FAILED|x|NonZeroExitCode", "FAILED"),
        ("7+0|FAILED|x|None\n7+1|RUNNING|x|None", "RUNNING"),
    ],
)
def test_the_queue_is_asked_first(commands: Commands, queue: str, state: str) -> None:
    says(commands, "squeue", queue)
    assert slurm.states(["7"]) == {"7": state}


@pytest.mark.parametrize(
    ("accounts", "state"),
    [
        ("7|COMPLETED", "COMPLETED"),
        ("7|CANCELLED by 1000", "CANCELLED"),
        ("7+0|CANCELLED by 0\n7+1|COMPLETED", "CANCELLED"),
        ("7+0|NODE_FAIL\n7+1|CANCELLED by 0", "NODE_FAIL"),
        ("7|TIMEOUT", "TIMEOUT"),
    ],
)
def test_what_the_queue_has_forgotten_the_accounting_knows(commands: Commands, accounts: str, state: str) -> None:
    says(commands, "squeue", "8|RUNNING|x|None")
    says(commands, "sacct", accounts)
    assert slurm.states(["7", "8"]) == {"7": state, "8": "RUNNING"}


def test_without_accounting_a_job_that_the_queue_has_forgotten_is_not_known(commands: Commands) -> None:
    says(commands, "squeue", "8|PENDING|N/A|Resources")
    assert slurm.states(["7", "8"]) == {"8": "PENDING"}


def test_an_accounting_that_hangs_is_not_waited_for(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_ACCOUNTING_MAY_TAKE_S", 0.5)
    says(commands, "squeue", "8|RUNNING|x|None")
    says(commands, "sacct", "7|COMPLETED", before="exec sleep 20")
    began = time.monotonic()
    assert slurm.states(["7", "8"]) == {"8": "RUNNING"}
    assert time.monotonic() - began < 10
