"""What `hpc-gym demo` shows before its job (bars for runtimes and model) and after it (the table)."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpc_gym.cli.build_view import Bars, Lines, progress_bars
from hpc_gym.cli.status_view import duration
from hpc_gym.jobs.report import EDGE_STEPS, Gain, Report
from hpc_gym.runtimes.install import Event

_MODEL_WORDS = {"tokenizer": "training the tokenizer", "train": "warm start", "saved": "ready"}
_LINE_EVERY = 0.25
"""Share of the warm start between two lines."""


class PreparationView(Protocol):
    """Shows what is prepared. Called from several threads."""

    def runtime(self, event: Event) -> None: ...

    def model(self, said: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def preparation_view(runtimes: Sequence[str]) -> Iterator[PreparationView]:
    """Bars on a terminal, lines elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    with progress_bars() as progress:
        yield _Bars(progress, runtimes)


class _Lines:
    def __init__(self) -> None:
        self.runtime = Lines()
        self._next = 0.0
        self._started = time.monotonic()

    def model(self, said: dict[str, Any]) -> None:
        share = said["step"] / said["steps"]
        if said["stage"] == "train" and share < self._next:
            return
        self._next = share + _LINE_EVERY
        step = f", step {said['step']}/{said['steps']}" if said["stage"] == "train" else ""
        since = f"{time.monotonic() - self._started:5.1f} s"
        print(f"{since}  model  {_MODEL_WORDS[said['stage']]}{step}", file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, progress: Any, runtimes: Sequence[str]) -> None:
        self.runtime = Bars(progress, runtimes)
        self._progress = progress
        self._task = progress.add_task("model", total=1.0, start=False, stage="waits for its runtime")

    def model(self, said: dict[str, Any]) -> None:
        if not self._progress.tasks[self._task].started:
            self._progress.start_task(self._task)
        text = _MODEL_WORDS[said["stage"]]
        if said["stage"] == "train":
            text += f", step {said['step']} of {said['steps']}"
        self._progress.update(self._task, completed=said["step"] / said["steps"], stage=text)


def print_report(report: Report, curve: Path, prepared: float) -> None:
    """The report as a person reads it. `prepared`: seconds for runtimes and model."""
    console = Console(highlight=False)
    title = (
        f"Mean reward: first → last {EDGE_STEPS} of {report.steps} steps; "
        "held-out rows before → after, gain with 90 % interval"
    )
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("environment", no_wrap=True)
    for name in ("training", "held out", "gain"):
        table.add_column(name, no_wrap=True, justify="right")
    for each in report.environments:
        training, held_out = _pair(each.first_steps, each.last_steps), _pair(each.before, each.after)
        table.add_row(each.name, training, held_out, _gain(each.gain))
    if len(report.environments) > 1:
        table.add_row("together", "", "", _gain(report.together), style="bold")
    console.print()
    console.print(table)
    stages = {"runtimes and model": prepared, **report.seconds}
    console.print("time: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items()))
    if report.largest_logp_difference is not None:
        told = f"{report.largest_logp_difference:.1e}"
        console.print(f"largest mean |log p(trainer) - log p(vLLM)| of a step: {told}")
    if report.failed:
        console.print(f"rollouts that failed and were not trained on: {report.failed}")
    # Paths whole, so that a terminal can open them.
    console.print(f"reward curve:  {curve}", soft_wrap=True)
    console.print(f"run directory: {report.run_dir}", soft_wrap=True)


def _pair(first: float | None, last: float | None) -> str:
    return " → ".join("-" if value is None else f"{value:.2f}" for value in (first, last))


def _gain(gain: Gain | None) -> str:
    return "-" if gain is None else f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
