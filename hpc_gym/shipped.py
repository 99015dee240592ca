"""Where the folders that travel with the package are: `templates`, `configs`, `containers` and `locks`.

They stand at the top of a checkout, and inside the package in an installed wheel.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """The shipped folder of that name.

    Raises FileNotFoundError when neither a checkout nor an installed wheel holds it.
    """
    for root in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(f"hpc-gym's own folder '{folder}' is missing beside {_PACKAGE}: reinstall hpc-gym")
