"""Finds what went wrong in log files: tracebacks and error lines with the lines around them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hpc_gym.jobs.log_files import LogFile
from hpc_gym.jobs.log_merge import Round
from hpc_gym.protocol.log_lines import STAMP_LENGTH, has_stamp

_BEFORE = 3
_AFTER = 2
_LONGEST = 400
"""Lines of one block; a longer one is given out in parts."""

_TRACEBACK = b"Traceback (most recent call last):"
# Programs that share a log put their name before each line: NeMo Gym "(policy_model) ", vLLM "(EngineCore pid=7) ".
_WRITER = re.compile(rb"^(?:\([\w .:=/-]{1,80}\) ?)+")
_MOST_WRITERS = 256
_LOGGED_WITH = re.compile(rb"^(?:ERROR|CRITICAL)[^\[\]]*\[[^\]]*\]\s?")
_CHAINED = (b"During handling of the above exception", b"The above exception was the direct cause")
_ERROR = re.compile(
    rb"\b(?:ERROR|CRITICAL|FATAL|Fatal Python error|Segmentation fault|Bus error|Killed"
    rb"|[Oo]ut of memory|CUDA error|NCCL error|No space left on device|Unable to allocate)\b"
    rb"|\bpanic: |^(?:\w+\.)*\w*(?:Error|Exception): "
)
# What every line that _ERROR finds has in it. A set of first letters is looked for four times as fast.
_MAY_BE_ERROR = re.compile(rb"[eECFpfKmsUx](?:rror|RROR|RITICAL|ATAL|anic|ault|illed|emory|pace|nable|ception)")
_NUMBERS = re.compile(rb"\d+|0x[0-9a-f]+")


class LogLine(NamedTuple):
    """A line taken apart: who wrote it, what it says without stamp, writer and logger, whether that is an error."""

    writer: bytes
    text: bytes
    is_error: bool

    @classmethod
    def of(cls, line: bytes) -> LogLine:
        """Takes apart a line as it stands in its file."""
        text = line[STAMP_LENGTH + 1 :] if has_stamp(line) else line
        writer = b""
        if text[:1] == b"(" and (match := _WRITER.match(text)):
            writer, text = match[0], text[match.end() :]
        if text[:1] in (b"E", b"C") and (match := _LOGGED_WITH.match(text)):
            return cls(writer, text[match.end() :], True)
        return cls(writer, text, _MAY_BE_ERROR.search(text) is not None and _ERROR.search(text) is not None)


@dataclass
class Block:
    """One error of one process: its lines with those around them, stamps included."""

    file: LogFile
    lines: list[bytes]
    first: int
    """Index of the line where the error itself begins."""
    told: bytes = b""
    """What it says: the exception that ends its traceback, or its last error line."""

    def kind(self) -> bytes:
        """What is the same for repetitions of one error, on other ranks too."""
        return kind_of(self.file, self.told)


def kind_of(file: LogFile, told: bytes) -> bytes:
    """What is the same for repetitions of one error, on other ranks too."""
    return file.role.encode() + _NUMBERS.sub(b"#", told)[:200]


@dataclass
class _Reader:
    """Follows what one writer writes to a log file, line by line; memory is bounded by a block."""

    file: LogFile
    recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=_BEFORE))
    block: Block | None = None
    in_traceback: bool = False
    had_traceback: bool = False
    after: int = 0

    def feed(self, raw: bytes, line: LogLine) -> Block | None:
        """Takes the next line; gives a block that has ended with it, or before it."""
        starts = _TRACEBACK in line.text
        if self.block is None:
            self._begin(raw, line, starts)
            return None
        chained = not line.text.strip() or line.text.startswith(_CHAINED)
        if line.is_error and not starts and not chained and self.had_traceback and not self.in_traceback:
            # The next error: its own traceback may follow.
            ended = self.end()
            self._begin(raw, line, starts)
            return ended
        self.block.lines.append(raw)
        self._go_on(line, starts)
        if (self.after <= 0 and not self.in_traceback) or len(self.block.lines) >= _LONGEST:
            return self.end()
        return None

    def _begin(self, raw: bytes, line: LogLine, starts: bool) -> None:
        if not starts and not line.is_error:
            self.recent.append(raw)
            return
        self.block = Block(self.file, [*self.recent, raw], len(self.recent), line.text)
        self.in_traceback = self.had_traceback = starts
        self.after = _AFTER
        self.recent.clear()

    def _go_on(self, line: LogLine, starts: bool) -> None:
        assert self.block is not None
        if starts:
            self.in_traceback = self.had_traceback = True
        elif self.in_traceback:
            # Its last line, the exception, is the first that is not indented.
            if line.text and not line.text[:1].isspace() and not line.text.startswith(_CHAINED):
                self.in_traceback, self.after = False, _AFTER
                self.block.told = line.text
        elif line.text.startswith(_CHAINED):
            self.in_traceback = True
        elif line.is_error:
            self.after = _AFTER
            self.block.told = line.text or self.block.told
        else:
            self.after -= 1

    def end(self) -> Block | None:
        block, self.block, self.in_traceback, self.had_traceback = self.block, None, False, False
        return block


def error_blocks(rounds: Iterable[Round]) -> Iterator[Block]:
    """The error blocks of merged log files, in the order in which they end; of repetitions of one error the first."""
    readers: dict[tuple[str, bytes], _Reader] = {}
    seen: set[bytes] = set()

    def new(block: Block | None) -> Iterator[Block]:
        if block is not None and (kind := block.kind()) not in seen:
            if len(seen) < 100_000:
                seen.add(kind)
            yield block

    for each in rounds:
        for file, raw in each:
            line = LogLine.of(raw)
            if (reader := readers.get((file.path, line.writer))) is None:
                key = (file.path, line.writer if len(readers) < _MOST_WRITERS else b"")
                reader = readers.setdefault(key, _Reader(file))
            if (block := reader.feed(raw, line)) is not None:
                yield from new(block)
    for reader in readers.values():
        yield from new(reader.end())
