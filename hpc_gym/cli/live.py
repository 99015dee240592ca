"""The live view of a job: on a terminal a moving table of its stages, elsewhere a line whenever something changes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.stages import Stage
from hpc_gym.jobs.state import JobWatch, has_ended
from hpc_gym.jobs.status import Status, StatusReader

_EVERY_S = 0.5
_SAME_STAGE_EVERY_S = 15.0
_MARKS = {"waiting": ("·", "dim"), "running": ("▸", "bold cyan"), "done": ("✓", "green"), "failed": ("✗", "bold red")}
_STATE_STYLES = {"RUNNING": "cyan", "COMPLETED": "green", "FAILED": "bold red", "CANCELLED": "yellow"}


def follow_job(record: JobRecord, *, as_json: bool = False) -> int:
    """Shows a job until it ends. Returns the exit code: 0 completed, 1 not, 130 left by Ctrl-C (the job goes on)."""
    try:
        status = watch_job(record, as_json=as_json)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nLeft the view; job {record.job_id} goes on. hpc-gym cancel {record.name} stops it.\n")
        return 130
    return 0 if status.state == "COMPLETED" else 1


def watch_job(record: JobRecord, *, as_json: bool = False) -> Status:
    """Shows a job until it ends; its last status."""
    reader, watch = StatusReader(record), JobWatch(record)
    if as_json:
        return _follow_as_json(reader, watch)
    if sys.stdout.isatty():
        return _follow_on_terminal(reader, watch)
    return _follow_in_lines(reader, watch)


def _follow_on_terminal(reader: StatusReader, watch: JobWatch) -> Status:
    console = Console(highlight=False)
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while True:
            status = reader.read(watch.standing())
            live.update(view(status))
            if has_ended(status.state):
                break
            time.sleep(_EVERY_S)
    console.print(view(status))
    return status


def _follow_as_json(reader: StatusReader, watch: JobWatch) -> Status:
    """One JSON object a line, whenever something but the time has changed."""
    before = None
    while True:
        status = reader.read(watch.standing())
        told = _told(status)
        if told != before:
            print(json.dumps(dataclasses.asdict(status)), flush=True)
            before = told
        if has_ended(status.state):
            return status
        time.sleep(_EVERY_S)


def _told(status: Status) -> object:
    stages = [(stage.name, stage.state, stage.detail) for stage in status.stages]
    return status.state, status.attempt, status.step, stages, status.notes, status.outcome


def _follow_in_lines(reader: StatusReader, watch: JobWatch) -> Status:
    printer = LinePrinter()
    while True:
        status = reader.read(watch.standing())
        for line in printer.new_lines(status):
            print(line, flush=True)
        if has_ended(status.state):
            return status
        time.sleep(_EVERY_S)


class LinePrinter:
    """Turns successive statuses into lines, one for every change worth one."""

    def __init__(self) -> None:
        self._attempt = 0
        self._told: dict[str, tuple[str, str, float]] = {}
        self._notes: tuple[str, ...] = ()
        self._ended = False

    def new_lines(self, status: Status) -> list[str]:
        lines = []
        if status.attempt != self._attempt:
            if status.attempt > 1:
                lines.append(f"attempt {status.attempt}")
                self._told.clear()
            self._attempt = status.attempt
        for stage in status.stages:
            if self._is_news(stage, status):
                lines.append(_line(stage, status))
        lines += [f"note: {note}" for note in status.notes if note not in self._notes]
        self._notes = status.notes
        if has_ended(status.state) and not self._ended:
            self._ended = True
            lines.append(f"job {status.job_id} {status.outcome or status.state} ({duration(status.seconds)})")
            lines.append(f"run directory: {status.run_dir}")
        now = time.strftime("%H:%M:%S")
        return [f"{now} {line}" for line in lines]

    def _is_news(self, stage: Stage, status: Status) -> bool:
        if stage.state == "waiting":
            return False
        state, detail, when = self._told.get(stage.name, ("", "", 0.0))
        changed = stage.state != state
        moved = stage.detail != detail and time.monotonic() - when >= _SAME_STAGE_EVERY_S
        if changed or moved or (stage.detail != detail and stage.state != "running"):
            self._told[stage.name] = (stage.state, stage.detail, time.monotonic())
            return True
        return False


def _line(stage: Stage, status: Status) -> str:
    took = f" in {duration(stage.seconds)}" if stage.state == "done" and stage.seconds is not None else ""
    words = [f"{stage.name}: {stage.state}{took}"]
    if stage.detail:
        words.append(stage.detail)
    if stage.name == "training" and status.step:
        words += _training_words(status)
    return ", ".join(words)


def _training_words(status: Status) -> list[str]:
    words = [f"{name} {reward:.3f}" for name, reward in status.rewards.items()]
    if not words and status.reward is not None:
        words = [f"reward {status.reward:.3f}"]
    if status.tokens_per_s is not None:
        words.append(f"{status.tokens_per_s:.0f} tokens/s")
    if status.failed_share:
        words.append(f"{status.failed_share:.1%} of rollouts failed")
    if status.time_left_s:
        words.append(f"{duration(status.time_left_s)} left")
    return words


def view(status: Status) -> RenderableType:
    """The status as a person reads it."""
    head = Text.assemble(
        (status.name, "bold"),
        "  job ",
        status.job_id,
        "  ",
        (status.state, _STATE_STYLES.get(status.state, "")),
        f"  attempt {status.attempt}" if status.attempt > 1 else "",
        f"  {duration(status.seconds)}",
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for stage in status.stages:
        mark, style = _MARKS[stage.state]
        shown: RenderableType = Spinner("dots", style="cyan") if stage.state == "running" else Text(mark, style=style)
        took = Text("" if stage.seconds is None else duration(stage.seconds), style="dim")
        table.add_row(shown, Text(stage.name, style=style), took, Text(stage.detail))
        if stage.name == "training" and status.step and stage.state in ("running", "failed", "done"):
            bar = ProgressBar(total=max(1, status.max_steps), completed=status.step, width=40)
            table.add_row("", "", "", bar)
            table.add_row("", "", "", _pace(status))
    parts: list[RenderableType] = [head, table]
    parts += [Text(f"! {note}", style="yellow") for note in status.notes]
    if status.outcome:
        parts.append(Text(status.outcome, style=_STATE_STYLES.get(status.state, "")))
    parts.append(Text(f"{_short(status.run_dir)}", style="dim"))
    return Group(*parts)


def _pace(status: Status) -> Text:
    words = Text("  ".join(_training_words(status)))
    if status.waiting_share is not None:
        words.append(f"  {status.waiting_share:.0%} waiting", style="dim")
    if status.checkpoint is not None:
        words.append(f"  checkpoint {status.checkpoint}", style="dim")
    return words


def duration(seconds: float) -> str:
    """`7.2 s`, `3 min 05 s`, `2 h 07 min`.

    >>> [duration(7.24), duration(185), duration(7620)]
    ['7.2 s', '3 min 05 s', '2 h 07 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
