"""The few lines of a running job's logs that a person who watches it wants to see.

These are: training steps, what a rank resumes from, errors of every process, and warnings of hpc-gym's own programs.
Not: warnings of vLLM and NeMo Gym, which start up with dozens, and whatever comes while the attempt is being stopped,
which is a consequence. An error that comes again and again is shown once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from hpc_gym.jobs.log_errors import LogLine, kind_of
from hpc_gym.jobs.log_files import LogFile, Selection, attempts, log_files
from hpc_gym.jobs.log_merge import Follower

_OURS = re.compile(r"rank-\d+|rollout-server|supervisor")
_NEWS = re.compile(rb"step \d+/\d+ |resuming from ")
_WARNING = re.compile(rb"\W?WARN")
_TRACEBACK = b"Traceback (most recent call last)"
_AT_ONCE = 8
"""Errors and warnings shown of one look; the others are counted."""
_LONGEST = 300


@dataclass(frozen=True)
class Highlight:
    """One line of one process. `is_error`: it, or what it warns of, is nothing good."""

    file: LogFile
    text: str
    is_error: bool


@dataclass
class Highlights:
    """Reads on in the logs of a job, from the attempt after those that are there now."""

    run_dir: Path
    left_out: int = 0
    """Errors and warnings of the last look that were too many."""
    _seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        past = max(attempts(self.run_dir), default=0)
        self._follower = Follower(
            lambda: (file for file in log_files(self.run_dir, Selection()) if file.attempt > past)
        )

    def new(self, *, stopping: bool = False, last: bool = False) -> list[Highlight]:
        """What has come since. `stopping`: the attempt is being stopped; `last`: nothing more will come."""
        found: list[Highlight] = []
        self.left_out = 0
        for each in self._follower.poll(last):
            for file, raw in each:
                line = LogLine.of(raw)
                ours = _OURS.fullmatch(file.process) is not None
                if ours and _NEWS.match(line.text):
                    found.append(Highlight(file, _shown(line), False))
                elif not stopping and self._is_trouble(file, line, ours):
                    if sum(each.is_error for each in found) < _AT_ONCE:
                        found.append(Highlight(file, _shown(line), True))
                    else:
                        self.left_out += 1
        return found

    def _is_trouble(self, file: LogFile, line: LogLine, ours: bool) -> bool:
        """Whether a line tells of trouble that has not been told of. Of a traceback, its last line does."""
        if _TRACEBACK in line.text or not (line.is_error or (ours and _WARNING.match(line.text))):
            return False
        kind = kind_of(file, line.text)
        if kind in self._seen or len(self._seen) > 10_000:
            return False
        self._seen.add(kind)
        return True


def _shown(line: LogLine) -> str:
    text = line.text.decode(errors="replace").strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
