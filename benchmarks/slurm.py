"""How fast a job's nodes are free, and how fast it runs again, on the Slurm of the tests.

    python benchmarks/slurm.py

Runs the tests of a job's life twice: with the test cluster's short timers, and with production's. Needs what
`tests/slurm/cluster/README.md` says; takes half an hour.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import record

TESTS = ("tests/slurm/test_job.py", "tests/slurm/test_lifecycle.py")
PRODUCTION = {"kill_wait": 30, "slurmd_timeout": 300}
EVERYTHING = "well or killed or scancel or limit or crashed or silent or preempted"


def measured(settings: dict[str, int]) -> list[dict[str, Any]]:
    """The figures that the tests note on a cluster with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures"
        environment = {**os.environ, "HPC_GYM_FIGURES": str(path), "HPC_GYM_SLURM_SETTINGS": json.dumps(settings)}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", EVERYTHING, "--timeout", "900"]
        # A test that fails has not noted its figure, and has said why.
        subprocess.run(command, env=environment | {"HPC_GYM_REQUIRE_SLURM": "1"}, check=False)
        return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    short, production = measured({}), measured(PRODUCTION)
    lines = ["| event | promise | KillWait=5, SlurmdTimeout=10 | KillWait=30, SlurmdTimeout=300 |", "|---|---|---|---|"]
    for event in dict.fromkeys(each["event"] for each in [*short, *production]):
        cells = []
        for figures in (short, production):
            seconds = [each["seconds"] for each in figures if each["event"] == event]
            cells.append(f"{statistics.median(seconds):.1f} s (largest {max(seconds):.1f})" if seconds else "")
        promise = next(each["within"] for each in short if each["event"] == event)
        told = f"{promise:.0f} s" if "running again" not in event else ""
        lines.append(f"| {event} | {told} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "Jobs of three nodes with small programs as roles. A requeued job waits 10 s here (`cred_expire`; 120 s by",
    ]
    lines += ["default), and Slurm gives a crashed node's place in the job free after SlurmdTimeout only."]
    record("A job's life on Slurm", "\n".join(lines))


if __name__ == "__main__":
    main()
