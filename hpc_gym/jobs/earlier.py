"""Why the attempts of a run before the last one ended: what a person wants to know in the morning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpc_gym.jobs.json_lines import JsonLines
from hpc_gym.protocol.attempt import Outcome
from hpc_gym.protocol.events import Event

_TAIL = 1 << 16


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended. Times are seconds since the epoch; None: nothing tells."""

    attempt: int
    kind: str
    """As in `Outcome`, or `unknown` where the attempt could not say: its first node was lost, say."""
    sentence: str
    began: float | None
    ended: float | None
    job_id: str = ""
    """Of the job that the attempt was of: a resume, and every link of a chain, is another one. "": nothing tells."""


@dataclass
class EarlierAttempts:
    """The attempts of a run that are over because another came after them; each is read once."""

    folder: Path
    """`attempts/` of the run directory."""
    _known: dict[int, AttemptEnd] = field(default_factory=dict)

    def all(self) -> tuple[AttemptEnd, ...]:
        """Every attempt there was, in order: where a job that resumes them waits for its first."""
        try:
            numbers = [int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()]
        except OSError:
            return ()
        return self.before(max(numbers, default=0) + 1)

    def before(self, attempt: int) -> tuple[AttemptEnd, ...]:
        """The attempts before that one, in order."""
        for number in range(1, attempt):
            if number not in self._known and (self.folder / str(number)).is_dir():
                self._known[number] = _end_of(self.folder / str(number), number)
        return tuple(self._known[number] for number in sorted(self._known) if number < attempt)


def _end_of(folder: Path, number: int) -> AttemptEnd:
    path = folder / "events.jsonl"
    first: Event = next(JsonLines(path).new(), {})
    began = next(_moments([first]), None)
    ended, job_id = began, str(first.get("job_id", ""))
    with contextlib.suppress(OSError):
        # Only the last events: there may be very many.
        size = path.stat().st_size
        ended = max(_moments(JsonLines(path, max(0, size - _TAIL)).new()), default=began)
    outcome = Outcome.read(folder)
    if outcome is None:
        sentence = "it could not say why; so it is when its first node is lost, and Slurm requeues the job by itself"
        return AttemptEnd(number, "unknown", sentence, began, ended, job_id)
    return AttemptEnd(number, outcome.kind, outcome.sentence(), began, ended, job_id)


def _moments(events: Iterable[Event]) -> Iterator[float]:
    return (float(event["time"]) for event in events if isinstance(event.get("time"), int | float))
