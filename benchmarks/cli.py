"""How long `hpc-gym` makes one wait, against what it cannot do without.

    python benchmarks/cli.py [--runs 15]

`--help` is measured against the bare interpreter, `submit demo --dry-run` against the bare import of the libraries it
needs. The commands take turns, so that whatever else the machine does meets them all. Needs the demo's model and data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import record

LIBRARIES = "import typer, omegaconf, pydantic, jinja2"
USED_OF_THEM = "import typer, omegaconf, jinja2; from pydantic import BaseModel, Field"
"""pydantic imports most of itself only when one of its names is asked for."""
HELP_WITHIN_S = 0.150
DRY_RUN_WITHIN = 1.4


def once(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds) of a command."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, os.times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, children


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    runs = parser.parse_args().runs
    hpc_gym = str(Path(sys.executable).with_name("hpc-gym"))
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "hpc-gym --help": [hpc_gym, "--help"],
        LIBRARIES: [sys.executable, "-c", LIBRARIES],
        USED_OF_THEM: [sys.executable, "-c", USED_OF_THEM],
        "hpc-gym submit demo --dry-run": [hpc_gym, "submit", "demo", "--dry-run", *parser.parse_args().override],
        "hpc-gym list": [hpc_gym, "list"],
        "hpc-gym status --help": [hpc_gym, "status", "--help"],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HPC_GYM_RUNS": folder, "XDG_STATE_HOME": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(folder)
        for command in commands.values():
            once(command, environment)
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(once(command, environment))
    wall = {name: statistics.median(seconds for seconds, _ in each) for name, each in times.items()}
    cpu = {
        name: statistics.mean(sorted(seconds for _, seconds in each)[: runs // 2 + 1]) for name, each in times.items()
    }
    ratios = [cpu["hpc-gym submit demo --dry-run"] / cpu[each] for each in (USED_OF_THEM, LIBRARIES)]
    rows = [f"| `{name}` | {wall[name] * 1000:.0f} ms | {cpu[name] * 1000:.0f} ms |" for name in commands]
    lines = ["| command | median time | CPU time (mean of the lower half) |", "|---|---|---|", *rows, ""]
    lines.append(f"`--help`: {wall['hpc-gym --help'] * 1000:.0f} ms (wanted: {HELP_WITHIN_S * 1000:.0f} ms).")
    lines.append("Dry run, in CPU time, which a busy machine does not change:")
    lines.append(f"{ratios[0]:.2f} x the bare import of what it uses of its libraries (wanted: {DRY_RUN_WITHIN});")
    lines.append(f"{ratios[1]:.2f} x without the parts of pydantic that are imported on demand.")
    record("Command line", "\n".join(lines))


if __name__ == "__main__":
    main()
