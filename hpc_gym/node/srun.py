"""The srun of an attempt, and what only it knows: which of its tasks have ended, and how.

A task that is killed before its supervisor could report, or together with it (Slurm kills with a task what it has left
in its cgroup), is missed by the coordinator only after a while, and then looks like a node that is lost.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpc_gym.node.slurm_task import SAYS

_ENDED = re.compile(r"srun: error: (?P<host>[^:\s]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)")
_NOT_STARTED = re.compile(r"srun: error: Task launch for \S+ failed on node (?P<host>\S+): (?P<why>.+)")
_SAID = re.compile(SAYS.format(host=r"(?P<host>\S+)") + "(?P<why>.+)")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_WORDS = 3
_RANGE = re.compile(r"\[(\w+)[^\]]*\]")
_SIGNALS = {signal.strsignal(number): number.name for number in signal.Signals}


@dataclass(frozen=True)
class TaskEnd:
    """The end of a task that did not end well, as srun tells it."""

    host: str
    task: int
    """Its number within its component of a heterogeneous job."""
    signal: str | None
    """Name of the signal that ended it, as "SIGKILL"."""
    exit_code: int | None
    seen: float
    """`time.monotonic`."""


@dataclass(frozen=True)
class NotStarted:
    """A node on which Slurm could not start a task. srun then ends those on all other nodes."""

    host: str
    why: str


class Srun:
    """A running srun. Its words go on to this process's stderr."""

    def __init__(self, command: Sequence[str]) -> None:
        self.ends: list[TaskEnd] = []
        """In the order in which srun told of them."""
        self.said: dict[str, str] = {}
        """By host, why a task could not begin there, in its own words."""
        self.not_started: NotStarted | None = None
        """The first such node."""
        self._words: deque[str] = deque(maxlen=_WORDS)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A signal to this process's group must not reach it: srun ends all tasks on SIGTERM.
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        )
        self._listener = threading.Thread(target=self._listen, name="srun", daemon=True)
        self._listener.start()

    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        code = self._process.poll()
        if code is not None:
            # Its last words.
            self._listener.join(1.0)
        return code

    def last_words(self) -> str:
        """The newest lines it said, in one."""
        return " / ".join(dict.fromkeys(self._words))

    def kill(self) -> None:
        self._process.kill()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            text = line.decode(errors="replace")
            self._words.append(text.strip())
            self.ends.extend(task_ends(text))
            self.not_started = self.not_started or not_started(text)
            if (found := _SAID.search(text)) is not None:
                self.said[found["host"]] = found["why"]


def task_ends(line: str) -> Iterator[TaskEnd]:
    """What a line of srun's tells of a task that has ended; nothing in most lines."""
    if (found := _ENDED.search(line)) is None:
        return
    how = found["how"].removesuffix(" (core dumped)").strip()
    code = _EXIT_CODE.match(how)
    name = _SIGNALS.get(how)
    if code is None and name is None:
        return
    # Of several in one line, the first: node[2-3]: tasks 1-2.
    host, task = _RANGE.sub(r"\1", found["host"]), int(re.split("[,-]", found["tasks"])[0])
    yield TaskEnd(host, task, name, int(code[1]) if code else None, time.monotonic())


def not_started(line: str) -> NotStarted | None:
    """What a line of srun's tells of a node on which it could not start a task."""
    found = _NOT_STARTED.search(line)
    return NotStarted(found["host"], found["why"].strip()) if found else None
