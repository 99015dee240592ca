"""Carries the output of a node's processes into their log files, with a time stamp before every line.

One thread for all, apart from the supervisor's event loop: a slow file system may hold up the output, never a
heartbeat. A line costs nothing in Python: whole reads are stamped by one `bytes.replace`. The form of the lines is
that of `hpc_gym.protocol.log_lines`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from hpc_gym.protocol.log_lines import stamp

_READ = 1 << 18
_PIPE = 1 << 20
_GATHER_S = 0.004
_KEPT = 1 << 16
_F_SETPIPE_SZ = 1031


@dataclass
class Stream:
    """The output of one process on its way into a file."""

    source: int
    target: int
    at_line_start: bool = True
    ended: threading.Event = field(default_factory=threading.Event)
    lost: int = 0
    """Bytes that could not be written (file system full)."""
    trouble: str = ""
    """Why not."""
    unwritten: bytes = b""
    """The last of them: they may tell why the process died."""


class LogPump:
    """Invariant: a pipe is read until everybody has closed it, whether or not its file can be written, so no process
    blocks on its output because a file system is full. One that hangs holds up who writes more than a pipe takes
    (1 MiB).
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._new: list[Stream] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log-pump", daemon=True)
        self._thread.start()

    def attach(self, path: Path) -> tuple[int, Stream]:
        """(the descriptor that a process writes its output to, its stream). The caller closes the descriptor."""
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        source, sink = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(sink, _F_SETPIPE_SZ, _PIPE)
        os.set_blocking(source, False)
        stream = Stream(source, target)
        self._new.append(stream)
        self._wake_up()
        return sink, stream

    def close(self, within_s: float = 2.0) -> None:
        """Writes out what is still in the pipes and ends the thread."""
        self._closing = True
        self._wake_up()
        self._thread.join(within_s)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if key.fd == self._woken:
                    os.read(self._woken, 64)
                else:
                    self._carry(key.data)
            while self._new:
                stream = self._new.pop(0)
                self._selector.register(stream.source, selectors.EVENT_READ, stream)
            # Reading at once what a process writes line by line costs 25 times as many reads as letting it gather.
            time.sleep(_GATHER_S)
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                while self._carry(key.data):
                    pass

    def _carry(self, stream: Stream) -> bool:
        """Moves one read; whether there may be more."""
        try:
            chunk = os.read(stream.source, _READ)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._end(stream)
            return False
        text, stream.at_line_start = stamped(chunk, stream.at_line_start, stamp(time.time()))
        self._write(stream, text)
        return True

    def _write(self, stream: Stream, text: bytes) -> None:
        view = memoryview(text)
        while view:
            try:
                view = view[os.write(stream.target, view) :]
            except OSError as error:
                stream.lost += len(view)
                stream.trouble = error.strerror or str(error)
                stream.unwritten = (stream.unwritten + view)[-_KEPT:]
                return

    def _end(self, stream: Stream) -> None:
        if not stream.at_line_start:
            self._write(stream, b"\n")
        self._selector.unregister(stream.source)
        os.close(stream.source)
        os.close(stream.target)
        stream.ended.set()


def stamped(chunk: bytes, at_line_start: bool, prefix: bytes) -> tuple[bytes, bool]:
    """(`chunk` with `prefix` before every line that starts in it, whether it ended at the end of a line)."""
    if b"\r" in chunk:
        # A progress bar begins its lines with the carriage return: no empty line before the first.
        chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if at_line_start and len(chunk) > 1:
            chunk = chunk.removeprefix(b"\n")
    ends = chunk.endswith(b"\n")
    body = (chunk[:-1] if ends else chunk).replace(b"\n", b"\n" + prefix)
    return b"".join((prefix if at_line_start else b"", body, b"\n" if ends else b"")), ends
