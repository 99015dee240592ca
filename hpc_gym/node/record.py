"""What `manifest.json` keeps of every attempt: when and where it ran, of which job, by which Plan."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_gym.protocol.files import write_whole

MANIFEST = "manifest.json"
_ASKING_MAY_TAKE_S = 10.0


def record_attempt(run_dir: Path, attempt: int, environment: Mapping[str, str]) -> None:
    """Adds the attempt to the run's manifest. Without one, or without room for it, nothing is recorded."""
    # Facts for later readers: nothing that the job needs, so nothing that may end it.
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((run_dir / MANIFEST).read_bytes())
        manifest.setdefault("attempts", {})[str(attempt)] = _facts(run_dir, environment)
        write_whole(run_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _facts(run_dir: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    in_slurm = "SLURM_JOB_ID" in environment
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": environment.get("HPC_GYM_JOB_ID"),
        "plan": hashlib.sha256((run_dir / "plan.json").read_bytes()).hexdigest(),
        "nodes": hosts(environment) if in_slurm else [platform.node()],
        "slurm": _said("scontrol", "--version").partition(" ")[2] or None if in_slurm else None,
        "system": platform.platform(),
    }


def hosts(environment: Mapping[str, str]) -> list[str]:
    """Host names of the allocation in rank order, which is that of the components of a heterogeneous job; empty where
    there is no Slurm, or no word of it.
    """
    groups = sorted(
        (int(found[1]), value)
        for name, value in environment.items()
        if (found := re.fullmatch(r"SLURM_JOB_NODELIST_HET_GROUP_(\d+)", name))
    )
    lists = [value for _, value in groups] or [environment.get("SLURM_JOB_NODELIST", "")]
    return [host for each in lists if each for host in _said("scontrol", "show", "hostnames", each).split()]


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ASKING_MAY_TAKE_S).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
