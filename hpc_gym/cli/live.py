"""Following a job: on a terminal a moving table of its stages, elsewhere a line whenever something changes.

Above the table, and among the lines, `submit --follow` also shows the few lines of the logs that matter.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from hpc_gym.cli.status_view import attempt_lines, duration, stage_words, view
from hpc_gym.jobs.highlights import Highlight, Highlights
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.stages import Stage
from hpc_gym.jobs.state import JobWatch, has_ended
from hpc_gym.jobs.status import Status, StatusReader

_EVERY_S = 0.5
_SAME_STAGE_EVERY_S = 15.0
_ROLE_STYLES = {"rollout": "cyan", "train": "green", "judge": "magenta", "environment": "yellow"}


def follow_job(record: JobRecord, *, as_json: bool = False, with_logs: bool = False) -> int:
    """Shows a job until it ends. Returns the exit code: 0 completed, 1 not, 130 left by Ctrl-C (the job goes on)."""
    try:
        status = watch_job(record, as_json=as_json, with_logs=with_logs)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\nLeft the view; job {record.job_id} goes on. Look again: hpc-gym status {record.name} --follow, or "
            f"hpc-gym logs {record.name} --follow. Stop it: hpc-gym cancel {record.name}\n"
        )
        return 130
    return 0 if status.state == "COMPLETED" else 1


def watch_job(record: JobRecord, *, as_json: bool = False, with_logs: bool = False) -> Status:
    """Shows a job until it ends; its last status. `with_logs`: also the lines of its logs that matter."""
    highlights = Highlights(Path(record.run_dir)) if with_logs and not as_json else None
    statuses = _statuses(StatusReader(record), JobWatch(record))
    if as_json:
        return _follow_as_json(statuses)
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return _follow_on_terminal(console, statuses, highlights)
    return _follow_in_lines(statuses, highlights)


def _statuses(reader: StatusReader, watch: JobWatch) -> Iterator[Status]:
    """The status now and every half second until the job has ended."""
    while True:
        status = reader.read(watch.standing())
        yield status
        if has_ended(status.state):
            return
        time.sleep(_EVERY_S)


def _follow_on_terminal(console: Console, statuses: Iterator[Status], highlights: Highlights | None) -> Status:
    printer = LinePrinter(highlights, with_stages=False)

    def drawn(status: Status, moving: bool) -> RenderableType:
        return view(status, moving=moving, encoding=console.encoding, width=console.width)

    with Live(console=console, refresh_per_second=8, transient=True) as live:
        for status in statuses:
            for line in printer.new_lines(status) if highlights else ():
                live.console.print(line, soft_wrap=True)
            live.update(drawn(status, True))
    console.print(drawn(status, False))
    return status


def _follow_as_json(statuses: Iterator[Status]) -> Status:
    """One JSON object a line, whenever something but the time has changed."""
    before = None
    for status in statuses:
        told = _told(status)
        if told != before:
            print(json.dumps(dataclasses.asdict(status)), flush=True)
            before = told
    return status


def _told(status: Status) -> object:
    stages = [(stage.name, stage.state, stage.detail) for stage in status.stages]
    return status.state, status.attempt, status.step, stages, status.notes, status.outcome


def _follow_in_lines(statuses: Iterator[Status], highlights: Highlights | None) -> Status:
    printer = LinePrinter(highlights)
    for status in statuses:
        for line in printer.new_lines(status):
            print(line.plain, flush=True)
    return status


class LinePrinter:
    """Turns successive statuses into lines, one for every change worth one."""

    def __init__(self, highlights: Highlights | None = None, *, with_stages: bool = True) -> None:
        self._highlights = highlights
        self._with_stages = with_stages
        self._attempt = 0
        self._told: dict[str, tuple[str, str, float]] = {}
        self._notes: tuple[str, ...] = ()
        self._stopping = ""
        self._ended = False

    def new_lines(self, status: Status) -> list[Text]:
        """The lines for what is new in this status, with the time of day."""
        now = time.strftime("%H:%M:%S ")
        return [Text.assemble((now, "dim"), line) for line in self._news(status)]

    def _news(self, status: Status) -> Iterator[Text]:
        if status.attempt != self._attempt:
            if status.attempt > 1:
                yield Text(f"attempt {status.attempt}", style="bold")
                yield from (Text(line, style="yellow") for line in attempt_lines(status)[-1:])
                self._told.clear()
            self._attempt = status.attempt
        for stage in status.stages if self._with_stages else ():
            if self._is_news(stage):
                yield Text(", ".join(stage_words(stage, status)))
        yield from (Text(f"note: {note}", style="yellow") for note in status.notes if note not in self._notes)
        self._notes = status.notes
        yield from self._of_logs(status)
        if status.stopping != self._stopping:
            self._stopping = status.stopping
            if status.stopping not in ("", "COMPLETED"):
                yield Text(f"stopping: {status.stopping}", style="yellow")
        if has_ended(status.state) and not self._ended and self._with_stages:
            self._ended = True
            yield Text(f"job {status.job_id} {status.outcome or status.state} ({duration(status.seconds)})")
            yield Text(f"run directory: {status.run_dir}")

    def _of_logs(self, status: Status) -> Iterator[Text]:
        if self._highlights is None:
            return
        found = self._highlights.new(stopping=bool(status.stopping), last=has_ended(status.state))
        yield from map(_log_line, found)
        if self._highlights.left_out:
            yield Text(f"... and {self._highlights.left_out} more: hpc-gym logs {status.name} --errors", style="red")

    def _is_news(self, stage: Stage) -> bool:
        if stage.state == "waiting":
            return False
        state, detail, when = self._told.get(stage.name, ("", "", 0.0))
        # The logs tell of every step.
        every = float("inf") if self._highlights and stage.name == "training" else _SAME_STAGE_EVERY_S
        changed = stage.state != state
        moved = stage.detail != detail and time.monotonic() - when >= every
        if changed or moved or (stage.detail != detail and stage.state != "running"):
            self._told[stage.name] = (stage.state, stage.detail, time.monotonic())
            return True
        return False


def _log_line(found: Highlight) -> Text:
    where = f"{found.file.node} {found.file.process}: "
    return Text.assemble((where, _ROLE_STYLES.get(found.file.role, "")), (found.text, "red" if found.is_error else ""))
