"""How fast a job's nodes are free, and how fast it runs again, on the Slurm of the tests.

    python benchmarks/slurm.py

Runs the tests of a job's life twice: with the test cluster's short timers, and with production's. Needs what
`tests/slurm/cluster/README.md` says; takes about half an hour.
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

TESTS = ["-m", "slurm and not e2e", "tests/slurm"]
PRODUCTION = {"kill_wait": 30, "slurmd_timeout": 300}
CLUSTERS = {"short": 2, "production": 4}
"""How many clusters work side by side: with production's timers the tests do little but wait."""


def measured(settings: dict[str, int], clusters: int) -> list[dict[str, Any]]:
    """The figures that the tests note on clusters with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures"
        environment = {**os.environ, "HPC_GYM_FIGURES": str(path), "HPC_GYM_SLURM_SETTINGS": json.dumps(settings)}
        command = [sys.executable, "-m", "pytest", "--quiet", f"--numprocesses={clusters}", "--timeout=1500", *TESTS]
        # A test that fails has noted what it reached, and says why.
        subprocess.run(command, env=environment | {"HPC_GYM_REQUIRE_SLURM": "1"}, check=False)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(short: list[dict[str, Any]], production: list[dict[str, Any]]) -> str:
    """A row per event, in the order in which they were met."""
    lines = ["| event | promise | KillWait=5, SlurmdTimeout=10 | KillWait=30, SlurmdTimeout=300 |", "|---|---|---|---|"]
    for event in sorted({each["event"] for each in [*short, *production]}, key=lambda event: ("again" in event, event)):
        cells = []
        for figures in (short, production):
            seconds = [each["seconds"] for each in figures if each["event"] == event]
            largest = f" (largest of {len(seconds)}: {max(seconds):.1f})" if len(seconds) > 1 else ""
            cells.append(f"{statistics.median(seconds):.1f} s{largest}" if seconds else "")
        promise = next(each["within"] for each in [*short, *production] if each["event"] == event)
        told = f"{promise:.0f} s" if "running again" not in event else ""
        lines.append(f"| {event} | {told} | {cells[0]} | {cells[1]} |")
    waited = ", ".join(f"{each[0]['requeue_wait']} s" for each in (short, production)[:1] if each)
    return "\n".join(
        [
            *lines,
            "",
            "Jobs of two and three nodes with small programs as roles; all clusters share this machine's cores.",
            f"A requeued job waits {waited} here (`cred_expire`; 120 s by default), and Slurm gives the place of a",
            "crashed node in the job free after SlurmdTimeout only.",
        ]
    )


def main() -> None:
    record(
        "A job's life on Slurm", table(measured({}, CLUSTERS["short"]), measured(PRODUCTION, CLUSTERS["production"]))
    )


if __name__ == "__main__":
    main()
