"""A job's status as a person reads it: a table of its stages on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hpc_gym.jobs.stages import Stage
from hpc_gym.jobs.state import has_ended
from hpc_gym.jobs.status import Status

_MARKS = {"waiting": ("·", "dim"), "running": ("▸", "bold cyan"), "done": ("✓", "green"), "failed": ("✗", "bold red")}
_ASCII_MARKS = {"waiting": "-", "running": ">", "done": "+", "failed": "x"}
_STATE_STYLES = {"RUNNING": "cyan", "COMPLETED": "green", "FAILED": "bold red", "CANCELLED": "yellow"}
_BARS = "▁▂▃▄▅▆▇█"
_ENDS_SHOWN = 3
_DAY_S = 86_400


def view(status: Status, *, moving: bool = False, encoding: str = "utf-8", width: int = 80) -> RenderableType:
    """The status for a terminal. `moving`: it is drawn again and again."""
    fancy = encoding.lower().startswith("utf")
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for stage in status.stages:
        mark, style = _MARKS[stage.state]
        shown: RenderableType = Text(mark if fancy else _ASCII_MARKS[stage.state], style=style)
        if moving and fancy and stage.state == "running":
            shown = Spinner("dots", style="cyan")
        took = Text("" if stage.seconds is None else duration(stage.seconds), style="dim")
        table.add_row(shown, Text(stage.name, style=style), took, Text(stage.detail))
        if stage.name == "training" and status.step:
            table.add_row("", "", "", ProgressBar(total=max(1, status.max_steps), completed=status.step, width=40))
            table.add_row("", "", "", Text(", ".join(pace_words(status))))
    parts: list[RenderableType] = [Text(_head(status), style="bold"), table]
    if status.curves:
        parts.append(_curves(status, fancy, width))
    parts += [Text(f"! {line}", style="yellow") for line in attempt_lines(status)[-_ENDS_SHOWN:]]
    parts += [Text(f"! {note}", style="yellow") for note in status.notes]
    if status.stopping and not status.outcome:
        parts.append(Text(f"stopping: {status.stopping}", style="yellow"))
    if status.outcome:
        parts.append(Text(status.outcome, style=_STATE_STYLES.get(status.state, "")))
    parts.append(Text(_short(status.run_dir), style="dim"))
    return Group(*parts)


def plain(status: Status) -> str:
    """The status in lines of plain text, each as long as it is, for a file or a program that reads it."""
    lines = [_head(status)]
    width = max(len(stage.name) for stage in status.stages)
    for stage in status.stages:
        took = "" if stage.seconds is None else duration(stage.seconds)
        lines.append(f"{stage.name:<{width}}  {stage.state:<7}  {took:>11}  {stage.detail}".rstrip())
        if stage.name == "training" and status.step:
            lines.append(f"{'':<{width}}  {', '.join(pace_words(status))}")
            lines += [f"{'':<{width}}  reward {name} {reward:.3f}" for name, reward in status.rewards.items()]
    lines += [*attempt_lines(status), *status.notes]
    if status.stopping and not status.outcome:
        lines.append(f"stopping: {status.stopping}")
    return "\n".join([*lines, *([status.outcome] if status.outcome else []), status.run_dir]) + "\n"


def _head(status: Status) -> str:
    attempt = f"  attempt {status.attempt}" if status.attempt > 1 else ""
    return f"{status.name}  job {status.job_id}  {status.state}{attempt}  {duration(status.seconds)}"


def pace_words(status: Status) -> list[str]:
    """How fast training is, what it waits for, what fails, what is left, and what a failure would cost."""
    words = []
    if status.tokens_per_s is not None:
        words.append(f"{status.tokens_per_s:,.0f} tokens/s")
    if status.waiting_share is not None:
        words.append(f"trainers wait {status.waiting_share:.0%} of the time")
    if status.failed_share is not None:
        words.append(f"{status.failed_share:.1%} of rollouts failed")
    words.append(_checkpoint(status))
    if status.time_left_s:
        words.append(f"{duration(status.time_left_s)} left")
    return words


def training_words(status: Status) -> list[str]:
    """The figures of a training step, for one line."""
    words = [f"{name} {reward:.3f}" for name, reward in status.rewards.items()]
    if not words and status.reward is not None:
        words = [f"reward {status.reward:.3f}"]
    return words + pace_words(status)


def _checkpoint(status: Status) -> str:
    if status.checkpoint is None or status.checkpoint_age_s is None:
        return "no checkpoint" if has_ended(status.state) else "no checkpoint yet"
    if status.state == "COMPLETED":
        return f"checkpoint {status.checkpoint}"
    when = "before the end" if has_ended(status.state) else "ago"
    return f"checkpoint {status.checkpoint} {duration(status.checkpoint_age_s)} {when}"


def _curves(status: Status, fancy: bool, width: int) -> RenderableType:
    """A line per environment: its last reward, how it came there, and between which values it lay."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=0)
    for _ in range(4):
        table.add_column(no_wrap=True)
    longest = max(map(len, status.curves))
    room = max(8, min(60, width - longest - 28))
    for name, curve in status.curves.items():
        low, high = min(curve), max(curve)
        last = f"{status.rewards[name]:.3f}" if name in status.rewards else ""
        drawn = sparkline(curve[-room:]) if fancy and len(curve) > 1 else ""
        between = f"{low:.2f} to {high:.2f}" if len(curve) > 1 else ""
        table.add_row("", Text(name), Text(last, style="bold"), Text(drawn, style="cyan"), Text(between, style="dim"))
    return table


def sparkline(values: Sequence[float]) -> str:
    """The values as bars between the lowest and the highest; nearly equal ones as a flat line.

    >>> sparkline([0.0, 0.5, 1.0]), sparkline([0.5, 0.501])
    ('▁▅█', '▄▄')
    """
    low, high = min(values), max(values)
    if high - low < 0.01:
        return _BARS[3] * len(values)
    return "".join(_BARS[min(7, int(8 * (value - low) / (high - low)))] for value in values)


def attempt_lines(status: Status) -> list[str]:
    """A line per attempt before the last one: when it ended, why, and when and where the next one went on."""
    followers = [*((each.began, each.job_id) for each in status.earlier_attempts[1:])]
    followers.append((status.attempt_began, status.attempt_job_id))
    last = len(status.earlier_attempts) - 1
    lines = []
    for position, (end, (then, job_id)) in enumerate(zip(status.earlier_attempts, followers, strict=False)):
        when = "" if end.ended is None else f" at {_clock(end.ended)}"
        took = "" if end.ended is None or end.began is None else f" after {duration(end.ended - end.began)}"
        why = re.sub(r" \(log: [^)]*\)", "", end.sentence.removeprefix("TO BE REQUEUED: "))
        words = f"attempt {end.attempt} ended{when}{took}: {why}"
        if then is not None and end.ended is not None:
            as_job = f" as job {job_id}" if job_id not in ("", end.job_id) else ""
            words += f"; attempt {end.attempt + 1} began {duration(max(0.0, then - end.ended))} later{as_job}"
            if position == last and status.resumed_from is not None:
                words += f", from step {status.resumed_from}"
        lines.append(words)
    return lines


def _clock(moment: float) -> str:
    """The time of day, with the day where that was not within the last one."""
    form = "%H:%M:%S" if abs(time.time() - moment) < _DAY_S else "%Y-%m-%d %H:%M:%S"
    return time.strftime(form, time.localtime(moment))


def duration(seconds: float) -> str:
    """`7.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`.

    >>> [duration(7.24), duration(185), duration(7620), duration(273_600)]
    ['7.2 s', '3 min 05 s', '2 h 07 min', '3 d 04 h']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def _short(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return path


def stage_words(stage: Stage, status: Status) -> Iterator[str]:
    """A stage in one line, in parts."""
    took = f" in {duration(stage.seconds)}" if stage.state == "done" and stage.seconds is not None else ""
    yield f"{stage.name}: {stage.state}{took}"
    if stage.detail:
        yield stage.detail
    if stage.name == "training" and status.step:
        yield from training_words(status)
