"""What the checks of an experiment find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What one check found. `warning`: the job may run, but a person should look."""

    check: str
    status: Literal["ok", "warning", "failed"]
    detail: str
