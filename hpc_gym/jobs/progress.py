"""What the events of an attempt add up to: which nodes joined, how far each process is, what went wrong."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hpc_gym.protocol.events import Event

_COUNTED = re.compile(r"(\d+) ?/ ?(\d+) (servers)\b")
_STATUS = b'"event": "status"'


@dataclass
class ProcessProgress:
    """One process of one node. Times are seconds since the epoch."""

    started: float | None = None
    ready: float | None = None
    text: str = ""
    """What it said last: on the way to ready, or its status."""
    counted: tuple[int, int, str] | None = None
    """Of how many parts how many are there, and what they are: (3, 9, "servers")."""
    saving: bool = False
    """Whether it is writing a checkpoint."""
    exited: float | None = None
    restarts: int = 0

    def say(self, text: str) -> None:
        """Takes what it says of itself."""
        self.text = text
        if parts := _COUNTED.match(text):
            self.counted = (int(parts[1]), int(parts[2]), parts[3])


@dataclass
class AttemptProgress:
    """The events of one attempt, added up."""

    attempt: int
    began: float | None = None
    """Moment at which its job script began."""
    job_id: str = ""
    """Of the job that it is of."""
    joined: dict[str, float] = field(default_factory=dict)
    """Node to the moment its supervisor reported."""
    hosts: dict[str, str] = field(default_factory=dict)
    """Node to the name of its host."""
    checked: dict[str, float] = field(default_factory=dict)
    """Node to the moment at which it was found fit for the job."""
    processes: dict[tuple[str, str], ProcessProgress] = field(default_factory=dict)
    """By node and process."""
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=5))
    stopping: str = ""
    """Why the attempt is being stopped."""
    last: float = 0.0
    """Moment of the latest event."""

    def take(self, event: Event) -> None:
        """Adds one event; one of a kind that is not known changes nothing."""
        moment, kind = float(event.get("time", 0.0)), event.get("event")
        node, name = str(event.get("node", "")), str(event.get("process", ""))
        self.last = max(self.last, moment)
        if not name:
            self._take_of_node(node, str(kind), moment, event)
            return
        process = self.processes.setdefault((node, name), ProcessProgress())
        if kind == "started":
            process.started, process.ready, process.exited = process.started or moment, None, None
            process.restarts, process.text, process.saving = int(event.get("restarts", 0)), "", False
        elif kind in ("progress", "status"):
            process.say(str(event.get("text", "")))
        elif kind == "ready":
            process.ready, process.text = moment, ""
            if process.counted is not None:
                _, of, what = process.counted
                process.counted = (of, of, what)
        elif kind in ("saving", "saved"):
            process.saving = kind == "saving"
        elif kind == "exited":
            process.exited, process.saving = moment, False
            if process.ready is None and event.get("exit_code") == 0:
                process.ready = moment
        elif kind == "restarting":
            self.notes.append(f"{name} on {node} is started again: {event.get('cause', '')}")
        elif kind == "hung":
            self.notes.append(f"{name} on {node} hangs: {str(event.get('cause', '')).removeprefix('hung: ')}")

    def _take_of_node(self, node: str, kind: str, moment: float, event: Event) -> None:
        if kind == "began":
            self.began, self.job_id = moment, str(event.get("job_id", ""))
        elif kind == "joined":
            self.joined.setdefault(node, moment)
            self.hosts[node] = str(event.get("host", ""))
        elif kind == "checked":
            self.checked.setdefault(node, moment)
        elif kind == "reached" and (unknown := event.get("unresolved")):
            self.notes.append(f"node {node} does not resolve {', '.join(unknown)}: the job goes by addresses")
        elif kind == "unfit":
            self.notes.append(f"node {node} is not fit: {event.get('cause', '')}")
        elif kind == "stalled":
            self.notes.append(f"training does not move: {event.get('cause', '')}")
        elif kind == "silent":
            self.notes.append(f"node {node} is silent: {event.get('cause', '')}")
        elif kind == "stopping":
            self.stopping = str(event.get("reason", "")) or "stopping"


def thinned_out(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of `events.jsonl`, without the statuses that the same process soon replaced by another: of the millions of
    lines that a long training leaves, nearly all are.
    """
    statuses: dict[bytes, bytes] = {}
    for line in lines:
        if _STATUS in line:
            statuses[line[line.find(b'"node"') : line.find(_STATUS)]] = line
            continue
        yield from statuses.values()
        statuses.clear()
        yield line
    yield from statuses.values()
