"""Shows the build of runtimes: a bar for each on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from hpc_gym.runtimes.build import build
from hpc_gym.runtimes.install import Event
from hpc_gym.runtimes.spec import is_built, spec_of

_WORDS = {
    "waiting": "waiting",
    "creating": "making the venv",
    "installing": "installing",
    "checking": "checking",
    "ready": "ready",
}


class View(Protocol):
    """What shows events. Called from several threads."""

    def __call__(self, event: Event) -> None: ...


def build_with_view(names: Sequence[str]) -> None:
    """Builds the named runtimes and shows how it goes. Raises as `hpc_gym.runtimes.build.build` does."""
    if not sys.stderr.isatty() or all(is_built(spec_of(name)) for name in names):
        build(names, Lines())
        return
    with progress_bars() as progress:
        build(names, Bars(progress, names))


def progress_bars() -> Any:
    """A rich `Progress` on stderr; a task's field `stage` says what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[stage]}", style="dim"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


class Lines:
    """One line per runtime and stage, on stderr."""

    def __init__(self) -> None:
        self._stage: dict[str, tuple[str, str]] = {}
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        told = (event.stage, event.text if event.stage != "installing" else "")
        with self._lock:
            if self._stage.get(event.runtime) != told:
                self._stage[event.runtime] = told
                text = f": {event.text}" if event.text else ""
                since = f"{time.monotonic() - self._started:5.1f} s"
                print(f"{since}  {event.runtime}  {_WORDS[event.stage]}{text}", file=sys.stderr, flush=True)


class Bars:
    """A rich progress bar per runtime. Packages are nine tenths of a bar: the rest is checking that they work."""

    def __init__(self, progress: Any, names: Sequence[str]) -> None:
        width = max(len(name) for name in names)
        self._progress = progress
        self._tasks = {
            name: progress.add_task(f"runtime {name:<{width}}", total=1.0, stage="waiting for its turn")
            for name in names
        }

    def __call__(self, event: Event) -> None:
        part = {"checking": 0.9, "ready": 1.0}.get(event.stage, 0.0)
        text = event.text or _WORDS[event.stage]
        if event.stage == "installing" and event.total:
            part = 0.9 * min(1.0, event.done / event.total)
            text = event.text or f"{event.done} of {event.total} packages"
        self._progress.update(self._tasks[event.runtime], completed=part, stage=text)
