"""Problems of an experiment, collected so that all of them are told at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_gym.config.provenance import KeyPath, Provenance, key_text
from hpc_gym.errors import UserError


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value at `path`: a sentence that names what is allowed, and what to do."""

    path: KeyPath
    message: str
    others: tuple[KeyPath, ...] = ()
    """Further keys that the numbers in it come from: it is told where they are set."""


def refuse(problems: Sequence[Problem], provenance: Provenance) -> None:
    """Raises UserError naming file, line and key of every problem; does nothing when there is none."""
    if not problems:
        return
    # A problem that two checks found is told once.
    lines = list(dict.fromkeys(problem_line(problem, provenance) for problem in problems))
    if len(lines) == 1:
        raise UserError(lines[0])
    raise UserError(f"{len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines))


def problem_line(problem: Problem, provenance: Provenance) -> str:
    """`where: key: sentence`, and where the other keys are set that it speaks of."""
    parts = [provenance.where(problem.path)]
    if problem.path:
        parts.append(key_text(problem.path))
    others = [(key_text(path), provenance.history(path)) for path in problem.others]
    told = "; ".join(f"{key}: {found[-1].where}" for key, found in others if found and found[-1].value is not None)
    return ": ".join([*parts, problem.message]) + (f" ({told})" if told else "")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid name when there is one, else all of them: ends a sentence."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    if not names:
        return "nothing may stand here."
    shown = ", ".join(names[:30])
    return f"allowed: {shown}{f' and {len(names) - 30} more' if len(names) > 30 else ''}."


def value_text(value: Any) -> str:
    """A value as it is quoted in a message: short, with its kind when text and number look alike."""
    if isinstance(value, str):
        text = value if len(value) <= 80 else value[:77] + "..."
        return f"'{text}'"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return str(value)
