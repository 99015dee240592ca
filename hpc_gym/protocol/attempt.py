"""How an attempt of a job ended, and the one sentence that says so wherever it is said.

The coordinator writes `attempts/K/outcome.json`, and for a failure `failure.json` in the same place and at the top of
the run directory. The last line of the job's log and `hpc-gym status` are `Outcome.sentence()`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_gym.protocol.files import write_whole

STOPPED_AT_CHECKPOINT = 85
"""Exit code of a task that was asked to save and stop (SIGUSR2) and did; and of a job that is to be requeued."""

RESERVE = ".reserve"
"""File in an attempt's directory that holds room for the attempt's last words."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that say that a file system has no room."""

Kind = Literal["completed", "failed", "requeue", "cancelled"]

_EXIT_CODES: dict[str, int] = {"completed": 0, "failed": 1, "requeue": STOPPED_AT_CHECKPOINT, "cancelled": 130}


@dataclass(frozen=True)
class Failure:
    """The first cause of a failure. `process` is "supervisor" where the node itself was lost."""

    role: str
    node: str
    process: str
    cause: str
    log: str
    """Path of the log file to read."""
    attempt: int
    time: float
    """Seconds since the epoch."""
    exit_code: int | None = None
    signal: str | None = None
    """Name of the signal that ended it, as "SIGKILL"."""

    def sentence(self) -> str:
        """Role, node, process, what happened, cause and log file, in one line."""
        what = "failed"
        if self.signal is not None:
            what = f"was killed by {self.signal}"
        elif self.exit_code is not None:
            what = f"exited with code {self.exit_code}"
        cause = f": {' '.join(self.cause.split())}" if self.cause else ""
        return f"role {self.role}, node {self.node}, process {self.process} {what}{cause} (log: {self.log})"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `exclude`: host names of nodes known to be bad, for the next attempt."""

    kind: Kind
    reason: str = ""
    exclude: tuple[str, ...] = ()
    failure: Failure | None = None

    @property
    def exit_code(self) -> int:
        return _EXIT_CODES[self.kind]

    def sentence(self) -> str:
        """One line for the person who reads the end of the job's log."""
        words = {"completed": "COMPLETED", "failed": "FAILED", "requeue": "TO BE REQUEUED", "cancelled": "CANCELLED"}
        detail = self.failure.sentence() if self.failure else self.reason
        without = f"; without {', '.join(self.exclude)}" if self.exclude else ""
        return f"{words[self.kind]}: {detail}{without}" if detail else words[self.kind]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """The outcome that `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        failure = data.pop("failure")
        return cls(**{**data, "exclude": tuple(data["exclude"]), "failure": Failure(**failure) if failure else None})

    @classmethod
    def read(cls, attempt_dir: str | Path) -> Outcome | None:
        """The outcome of an attempt, None when it has none (yet), or none that can be read."""
        try:
            return cls.from_json((Path(attempt_dir) / "outcome.json").read_text())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, run_dir: str | Path, attempt_dir: str | Path) -> None:
        """Writes `outcome.json` and `failure.json`, each whole or not at all.

        Where the file system is full, they take the room that was reserved for them.
        """
        try:
            self._write(run_dir, attempt_dir)
        except OSError as error:
            if error.errno not in FULL:
                raise
            (Path(attempt_dir) / RESERVE).unlink(missing_ok=True)
            self._write(run_dir, attempt_dir)

    def _write(self, run_dir: str | Path, attempt_dir: str | Path) -> None:
        if self.failure is not None:
            text = json.dumps(dataclasses.asdict(self.failure), indent=1) + "\n"
            write_whole(Path(attempt_dir) / "failure.json", text)
            if self.kind == "failed":
                write_whole(Path(run_dir) / "failure.json", text)
        write_whole(Path(attempt_dir) / "outcome.json", self.to_json())
