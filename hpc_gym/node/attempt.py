"""`python -m hpc_gym.node.attempt RUN_DIR`: begins an attempt, once, at the start of the job script.

Makes the attempt's directory and secrets file, and prints shell exports for the script to `eval`. Never prints a
secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.node.context import node_address, secrets_path
from hpc_gym.node.ports import Ports
from hpc_gym.node.record import hosts, record_attempt
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import RESERVE, Outcome
from hpc_gym.protocol.secrets import Secrets, write_secrets

_RESERVED = 1 << 18
"""Bytes kept for the attempt's last words, should the file system be full by then."""
SUBMITTED = "submitted.json"
"""In `RUN_DIR/secrets`: `{"env": {NAME: value}}`, 0600, written at submit, for every attempt of the job."""


def begin(run_dir: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Begins the next attempt; returns the variables that its supervisors need. Raises UserError for a broken run
    directory.
    """
    try:
        plan = Plan.read(run_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir} is no run directory that can be started: plan.json: {error}") from None
    try:
        attempt = _make_directory(plan, run_dir, environment)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written to: {error.strerror}") from None
    record_attempt(run_dir, attempt, environment)
    address, _ = node_address(plan)
    ports = Ports()
    port = ports.single()
    ports.release()
    told = {"HPC_GYM_ATTEMPT": str(attempt), "HPC_GYM_COORDINATOR": f"{address}:{port}"}
    return told | ({"HPC_GYM_HOSTS": ",".join(names)} if (names := hosts(environment)) else {})


def _make_directory(plan: Plan, run_dir: Path, environment: Mapping[str, str]) -> int:
    """Makes the directory of the next attempt and its secrets; returns the attempt's number."""
    attempt = _next_attempt(run_dir / "attempts")
    folder = run_dir / "attempts" / str(attempt)
    (folder / "logs").mkdir()
    # Not zeros: a file system that compresses would reserve nothing.
    (folder / RESERVE).write_bytes(os.urandom(_RESERVED))
    _note_beginning(run_dir, attempt, environment)
    _point_latest(run_dir / "attempts", attempt)
    # It tells of an attempt before this one; that attempt's directory keeps its copy.
    (run_dir / "failure.json").unlink(missing_ok=True)
    _make_secrets(plan, run_dir, attempt, environment)
    return attempt


def _note_beginning(run_dir: Path, attempt: int, environment: Mapping[str, str]) -> None:
    """Writes the first event of the attempt: its nodes are allocated. The coordinator writes all others."""
    head = {"time": time.time(), "attempt": attempt, "node": "", "role": "", "process": "", "event": "began"}
    told = {"host": os.uname().nodename, "job_id": environment.get("HPC_GYM_JOB_ID", "")}
    with (run_dir / "attempts" / str(attempt) / "events.jsonl").open("a") as file:
        file.write(json.dumps(head | told) + "\n")


def _ended(run_dir: Path) -> Outcome | None:
    """How the run has ended, where a job of a chain, or one that somebody requeued, has nothing left to do."""
    outcome = Outcome.read(run_dir / "attempts" / "latest")
    return None if outcome is None or outcome.kind == "requeue" else outcome


def end(run_dir: Path) -> None:
    """Removes the secrets of a run of which no further attempt follows."""
    shutil.rmtree(run_dir / "secrets", ignore_errors=True)


def _next_attempt(folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    numbers = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]
    number = max(numbers, default=0) + 1
    while True:
        try:
            (folder / str(number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return number


def _point_latest(folder: Path, attempt: int) -> None:
    temporary = folder / f".latest.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(str(attempt))
    temporary.replace(folder / "latest")


def _make_secrets(plan: Plan, run_dir: Path, attempt: int, environment: Mapping[str, str]) -> None:
    folder = run_dir / "secrets"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    submitted: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        submitted = json.loads((folder / SUBMITTED).read_text())["env"]
    found = {name: submitted.get(name) or environment.get(name) or "" for name in plan.secrets}
    env = {name: value for name, value in found.items() if value}
    write_secrets(secrets_path(run_dir, attempt), Secrets(secrets.token_urlsafe(32), env))


def main() -> int:
    """Prints the exports, and unsets what now travels in the secrets file. Returns the exit code."""
    run_dir = Path(sys.argv[1]).resolve()
    if (ended := _ended(run_dir)) is not None:
        said = f"nothing to go on with: the run has ended. {ended.sentence()}"
        # Slurm is to say the same of this job.
        print(f"echo {shlex.quote(said)}; exit {ended.exit_code}")
        return 0
    try:
        exports = begin(run_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}")
    if names := Plan.read(run_dir).secrets:
        print(f"unset {' '.join(shlex.quote(name) for name in names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
