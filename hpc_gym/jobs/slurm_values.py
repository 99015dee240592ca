"""Values of sbatch's options, read as Slurm reads them. Pure."""

from __future__ import annotations

import re

from hpc_gym.jobs.slurm_script import Directives

_GPUS = re.compile(r"(?:^|,)(?:gpu(?::[^:,=]+)?[:=])?(\d+)$")


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


def gpus_per_node(options: Directives) -> int:
    """GPUs per node that a component asks for."""
    for name in ("gpus-per-node", "gres", "gpus-per-task"):
        if name in options and (found := _GPUS.search(options[name] or "")):
            return int(found[1])
    return 0
