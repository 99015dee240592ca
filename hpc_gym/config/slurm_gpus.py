"""The GPUs that options of sbatch ask for, read as Slurm reads them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PER_NODE = ("gpus-per-node", "gres", "gpus-per-task", "tres-per-task")
"""Options that say how many GPUs a node has, for a node has one task. Of several, Slurm wants the same of all."""
_ONE_GRES = re.compile(r"(?:gres[/:])?gpu(?:[:=](.*))?", re.IGNORECASE)
_COUNT = re.compile(r"(?:[^:=,()]+[:=])?(\d+)")


def gpu_option(options: Mapping[str, object]) -> str | None:
    """The option that asks for GPUs, as it is written in `options`; None where none does.

    Others that are counted alike (`gres: lscratch:200`) ask for something else.
    """
    written = {name.replace("_", "-"): name for name, value in options.items() if _parts(name, value)}
    return next((written[name] for name in (*_PER_NODE, *written) if name in written), None)


def gpus_per_node(options: Mapping[str, object]) -> int | None:
    """GPUs per node that the options ask for; None where they ask for none, or where only Slurm knows how many
    (`gpus-per-socket`).
    """
    name = gpu_option(options)
    if name is None or name.replace("_", "-") not in _PER_NODE:
        return None
    counts = [_count(part) for part in _parts(name, options[name])]
    return None if None in counts else sum(filter(None, counts))


def _parts(name: str, value: object) -> list[str]:
    """What the option says of GPUs, as `h100:8`; the empty text says one, of any type."""
    option = name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return []
    parts = [part.strip() for part in str(value).split(",")]
    if option.startswith("gpus"):
        return parts
    if option != "gres" and not option.startswith("tres-per"):
        return []
    return [found[1] or "" for part in parts if (found := _ONE_GRES.fullmatch(part))]


def _count(part: str) -> int | None:
    """`8`, `h100:8`, and `h100` or nothing, which are one; None for what is no count (`h100:many`)."""
    if found := _COUNT.fullmatch(part):
        return int(found[1])
    return None if re.search(r"[:=]", part) else 1
