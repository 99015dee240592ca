"""Finds what went wrong in log files: tracebacks and error lines with the lines around them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hpc_gym.jobs.log_files import LogFile
from hpc_gym.jobs.log_merge import Round
from hpc_gym.protocol.log_lines import parse_line

_BEFORE = 3
_AFTER = 2
_LONGEST = 400
"""Lines of one block; a longer one is given out in parts."""

_TRACEBACK = b"Traceback (most recent call last):"
# Worker prefixes, as vLLM's "(EngineCore pid=7) " and Ray's "(run pid=7) ", stand before every line of a traceback.
_WORKER = re.compile(rb"^(?:\([^()]*pid=\d+[^()]*\)\s?)+")
_LOGGED_WITH = re.compile(rb"^(?:ERROR|CRITICAL)[^\[\]]*\[[^\]]*\]\s?")
_CHAINED = (b"During handling of the above exception", b"The above exception was the direct cause")
_ERROR = re.compile(
    rb"\b(?:ERROR|CRITICAL|FATAL|Fatal Python error|panic:|Segmentation fault|Bus error|Killed"
    rb"|[Oo]ut of memory|CUDA error|NCCL error|No space left on device|Unable to allocate)\b"
    rb"|^(?:\w+\.)*\w*(?:Error|Exception): "
)
_NUMBERS = re.compile(rb"\d+|0x[0-9a-f]+")


@dataclass
class Block:
    """One error of one process: its lines with those around them, stamps included."""

    file: LogFile
    lines: list[bytes]
    first: int
    """Index of the line where the error itself begins."""

    def kind(self) -> bytes:
        """What is the same for repetitions of one error: its last telling line without numbers."""
        told = [line for line in map(_text, self.lines[self.first :]) if line and not line[:1].isspace()]
        return self.file.role.encode() + _NUMBERS.sub(b"#", (told or [b""])[-1])[:200]


@dataclass
class _Reader:
    """Follows one log file line by line; memory is bounded by a block."""

    file: LogFile
    recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=_BEFORE))
    block: Block | None = None
    in_traceback: bool = False
    after: int = 0

    def feed(self, line: bytes) -> Block | None:
        """Takes the next line; gives a block that has ended with it."""
        text = _text(line)
        starts = _TRACEBACK in text
        if self.block is None:
            if starts or _ERROR.search(text):
                self.block = Block(self.file, [*self.recent, line], len(self.recent))
                self.in_traceback, self.after = starts, _AFTER
                self.recent.clear()
            else:
                self.recent.append(line)
            return None
        self.block.lines.append(line)
        if starts:
            self.in_traceback = True
        elif self.in_traceback:
            # Its last line, the exception, is the first that is not indented.
            if text and not text[:1].isspace() and not text.startswith(_CHAINED):
                self.in_traceback, self.after = False, _AFTER
        elif text.startswith(_CHAINED):
            self.in_traceback = True
        elif _ERROR.search(text):
            self.after = _AFTER
        else:
            self.after -= 1
        if (self.after <= 0 and not self.in_traceback) or len(self.block.lines) >= _LONGEST:
            return self.end()
        return None

    def end(self) -> Block | None:
        block, self.block, self.in_traceback = self.block, None, False
        return block


def _text(line: bytes) -> bytes:
    """A line without its stamp and the prefixes of workers and loggers."""
    text = parse_line(line)[1] if line[:2] == b"20" else line
    return _LOGGED_WITH.sub(b"", _WORKER.sub(b"", text)) if text[:1] in b"(EC" else text


def error_blocks(rounds: Iterable[Round]) -> Iterator[Block]:
    """The error blocks of merged log files, in the order in which they end; of repetitions of one error the first."""
    readers: dict[str, _Reader] = {}
    seen: set[bytes] = set()

    def new(block: Block | None) -> Iterator[Block]:
        if block is not None and (kind := block.kind()) not in seen:
            if len(seen) < 100_000:
                seen.add(kind)
            yield block

    for each in rounds:
        for file, line in each.in_order():
            if (reader := readers.get(file.path)) is None:
                reader = readers[file.path] = _Reader(file)
            if (block := reader.feed(line)) is not None:
                yield from new(block)
    for reader in readers.values():
        yield from new(reader.end())
