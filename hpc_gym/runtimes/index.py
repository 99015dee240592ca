"""Where packages come from: uv's own settings, and pip's for what uv does not read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def index_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with pip's index settings under uv's names, where uv's are not set, and with byte code allowed.

    A site that has a mirror of PyPI names it in pip's variables; uv does not read them.
    """
    values = dict(environment)
    for pip, uv in (("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), ("PIP_EXTRA_INDEX_URL", "UV_INDEX")):
        if pip in values:
            values.setdefault(uv, values[pip])
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    values.pop("VIRTUAL_ENV", None)
    values.pop("PYTHONPATH", None)
    return values


def torch_arguments(torch: str) -> list[str]:
    """uv's arguments for the source of PyTorch. `torch`: the build that the runtime needs ("cpu"), or "".

    A build of its own is looked for in `$PIP_FIND_LINKS` first, as pip does. PyTorch's public index (`--torch-backend`)
    is asked only where none of those folders holds a torch wheel: uv would ask it even for a wheel that is at hand, and
    many clusters cannot reach it.
    """
    if not torch:
        # From the ordinary index: a CPU wheel in $PIP_FIND_LINKS must not come in the place of the CUDA build.
        return []
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    arguments = [argument for link in links for argument in ("--find-links", link)]
    at_hand = any("://" in link or any(Path(link).glob("torch-*.whl")) for link in links)
    return arguments if at_hand else [*arguments, "--torch-backend", torch]
