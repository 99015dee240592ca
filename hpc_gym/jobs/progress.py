"""What the events of an attempt add up to: which nodes joined, how far each process is, what went wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hpc_gym.protocol.events import Event


@dataclass
class ProcessProgress:
    """One process of one node. Times are seconds since the epoch."""

    started: float | None = None
    ready: float | None = None
    text: str = ""
    """What it said last: on the way to ready, or its status."""
    exited: float | None = None
    restarts: int = 0


@dataclass
class AttemptProgress:
    """The events of one attempt, added up."""

    attempt: int
    joined: dict[str, float] = field(default_factory=dict)
    """Node to the moment its supervisor reported."""
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
            process.restarts, process.text = int(event.get("restarts", 0)), ""
        elif kind in ("progress", "status"):
            process.text = str(event.get("text", ""))
        elif kind == "ready":
            process.ready, process.text = moment, ""
        elif kind == "exited":
            process.exited = moment
            if process.ready is None and event.get("exit_code") == 0:
                process.ready = moment
        elif kind == "restarting":
            self.notes.append(f"{name} on {node} is started again: {event.get('cause', '')}")
        elif kind == "hung":
            self.notes.append(f"{name} on {node} hangs: {event.get('cause', '')}")

    def _take_of_node(self, node: str, kind: str, moment: float, event: Event) -> None:
        if kind == "joined":
            self.joined.setdefault(node, moment)
        elif kind == "silent":
            self.notes.append(f"node {node} is silent: {event.get('cause', '')}")
        elif kind == "stopping":
            self.stopping = str(event.get("reason", "")) or "stopping"
