"""What runtimes there are on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_gym.runtimes.spec import MARKER, names, runtimes_folder, spec_of


@dataclass(frozen=True)
class Entry:
    """A runtime as it is on disk. `lock` is the digest in its folder's name; `python` its version, "" if not built."""

    name: str
    state: Literal["ready", "not built", "unfinished", "outdated"]
    size_mib: int
    python: str
    lock: str
    path: str


def inventory() -> list[Entry]:
    """All runtimes of this hpc-gym, then the ones that other versions of it (or of a lock) have left: `outdated`."""
    current = [spec_of(name) for name in names()]
    entries = [_entry(spec.name, spec.digest, spec.root, outdated=False) for spec in current]
    roots = {spec.root for spec in current}
    for marker in sorted(runtimes_folder().glob(f"*/{MARKER}")):
        if marker.parent not in roots:
            name, _, digest = marker.parent.name.rpartition("-")
            entries.append(_entry(name, digest, marker.parent, outdated=True))
    return entries


def _entry(name: str, digest: str, root: Path, outdated: bool) -> Entry:
    try:
        facts: dict[str, Any] = json.loads((root / MARKER).read_text())
    except FileNotFoundError:
        return Entry(name, "unfinished" if root.exists() else "not built", 0, "", digest, str(root))
    state: Literal["ready", "outdated"] = "outdated" if outdated else "ready"
    return Entry(name, state, facts["size_mib"], facts["python"], digest, str(root))
