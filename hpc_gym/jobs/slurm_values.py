"""Times in sbatch's options and in what Slurm tells, read as Slurm reads them. Pure."""

from __future__ import annotations


def minutes(text: str) -> float:
    """Minutes of a time as sbatch takes it: 30, 30:00, 12:00:00, 2-0, 2-12:30, UNLIMITED (infinity)."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = text.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    if dash:
        hours, mins, secs = [*parts, 0.0, 0.0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, (mins, secs) = 0.0, [*parts, 0.0][:2]
    return float(days or 0) * 1440 + hours * 60 + mins + secs / 60
