"""How fast a job's nodes are free, and how fast it runs again, on the Slurm of the tests.

    python benchmarks/slurm.py [-k EXPRESSION] [FILE ...]

Runs the tests of a job's life twice: with the test cluster's short timers, and with production's. Needs what
`tests/slurm/cluster/README.md` says; takes about half an hour. With a selection of the tests, as pytest takes it, the
other figures stay.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import RESULTS, record

SECTION = "A job's life on Slurm"
TESTS = "tests/slurm"
MARKS = "slurm and not e2e"
SHORT = {"kill_wait": 5, "slurmd_timeout": 20}
PRODUCTION = {"kill_wait": 30, "slurmd_timeout": 300}
CLUSTERS = {"short": 2, "production": 4}
"""How many clusters work side by side: with production's timers the tests do little but wait."""


Figures = dict[str, list[dict[str, Any]]]
"""What the tests noted, by the event."""
Row = tuple[str, str, str]
"""The promise, and what was reached with short timers and with production's."""


def measured(settings: dict[str, int], clusters: int, selection: list[str]) -> Figures:
    """The figures that the tests note on clusters with these settings."""
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures"
        environment = {**os.environ, "HPC_GYM_FIGURES": str(path), "HPC_GYM_SLURM_SETTINGS": json.dumps(settings)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--quiet",
            f"--numprocesses={clusters}",
            "--timeout=1500",
            "-m",
            MARKS,
        ]
        # A test that fails has noted what it reached, and says why.
        subprocess.run([*command, *selection], env=environment | {"HPC_GYM_REQUIRE_SLURM": "1"}, check=False)
        for line in path.read_text().splitlines() if path.exists() else []:
            figure = json.loads(line)
            found.setdefault(figure["event"], []).append(figure)
    return found


def rows(short: Figures, production: Figures, before: dict[str, Row]) -> dict[str, Row]:
    """A row per event. What was not measured stays as it was `before`."""
    found = dict(before)
    for event in {**short, **production}:
        _, one, two = found.get(event, ("", "", ""))
        one, two = _cell(short.get(event, [])) or one, _cell(production.get(event, [])) or two
        promise = [*short.get(event, []), *production.get(event, [])][0]["within"]
        found[event] = (f"{promise:.0f} s" if "running again" not in event else "", one, two)
    return found


def _cell(figures: list[dict[str, Any]]) -> str:
    seconds = [each["seconds"] for each in figures]
    if not seconds:
        return ""
    largest = f" (largest of {len(seconds)}: {max(seconds):.1f})" if len(seconds) > 1 else ""
    return f"{statistics.median(seconds):.1f} s{largest}"


def recorded() -> dict[str, Row]:
    """The rows of the last run."""
    section = re.search(rf"^## {SECTION}\n(.*?)(?=^## |\Z)", RESULTS.read_text(), re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^\| (.+?) \|(.*?)\|(.*?)\|(.*?)\|$", section[1] if section else "", re.MULTILINE)
    return {
        event: (promise.strip(), one.strip(), two.strip()) for event, promise, one, two in lines if event != "event"
    }


def table(found: dict[str, Row]) -> str:
    """First what a job promises, then how soon it runs again."""
    heads = [f"KillWait={each['kill_wait']}, SlurmdTimeout={each['slurmd_timeout']}" for each in (SHORT, PRODUCTION)]
    lines = [f"| event | promise | {heads[0]} | {heads[1]} |", "|---|---|---|---|"]
    for event in sorted(found, key=lambda event: ("again" in event, event)):
        lines.append(f"| {event} | {' | '.join(found[event])} |")
    return "\n".join(
        [
            *lines,
            "",
            "Jobs of two and three nodes with small programs as roles; all clusters share this machine's cores.",
            "A requeued job waits 5 s here (`cred_expire`; 120 s by default). A lost node is given back to Slurm; that",
            "of the coordinator nobody but Slurm can miss, after SlurmdTimeout and up to two thirds more.",
        ]
    )


def main() -> None:
    selection = sys.argv[1:]
    short = measured(SHORT, CLUSTERS["short"], selection or [TESTS])
    production = measured(PRODUCTION, CLUSTERS["production"], selection or [TESTS])
    record(SECTION, table(rows(short, production, recorded() if selection else {})))


if __name__ == "__main__":
    main()
