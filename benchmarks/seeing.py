"""`hpc-gym list` and `hpc-gym status` among many past runs, and the status of a run with a long history.

    python benchmarks/seeing.py [--runs 1000]

The runs are whole run directories on this disk: job record, plan, events, metrics, outcome. Half of them are Slurm jobs
that have ended; what asking a real Slurm takes is measured in tests/slurm/test_seeing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from results import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import job_plans

from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.protocol.attempt import Outcome

WITHIN_S = 1.0
START = 1_790_000_000.0
LONG_STEPS, LONG_STATUSES = 20_000, 500_000


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def event(second: float, kind: str, process: str = "", **fields: object) -> dict[str, Any]:
    head = {"time": START + second, "attempt": 1, "node": "train-0", "role": "train", "process": process}
    return {**head, "event": kind, **fields}


def make_run(folder: Path, number: int, steps: int, statuses: int) -> None:
    """A run that has ended, with `steps` training steps and `statuses` statuses in its event log."""
    attempt = folder / "attempts" / "1"
    (attempt / "logs").mkdir(parents=True)
    (folder / "attempts" / "latest").symlink_to("1")
    plan = job_plans.plan(folder, train=[[job_plans.notifying("rank-0", "pass")]], max_steps=steps)
    (folder / "plan.json").write_text(plan.to_json())
    begin = [event(0, "began"), event(1, "joined", host="node1"), event(1, "started", "rank-0", restarts=0, pid=1)]
    said = (event(3 + n, "status", "rank-0", text=f"step {n}/{n}: rollouts 3/8") for n in range(statuses))
    lines(attempt / "events.jsonl", [*begin, event(2, "ready", "rank-0"), *said])
    told = {"reward": 0.5, "reward/sums": 0.5, "reward/tools": 0.4, "rollouts": 96, "failed": 1, "tokens": 80_000}
    lines(folder / "metrics.jsonl", ({"attempt": 1, "step": n + 1, "time": START + n, **told} for n in range(steps)))
    Outcome("completed").write(folder, attempt)
    kind = "local" if number % 2 else "slurm"
    gone = ProcessIdentity(os.uname().nodename, "another life", 1, 1) if kind == "local" else None
    where = ("local", "local") if kind == "local" else ("slurm", "my-site")
    JobRecord(str(number), where[0], folder.name, str(folder), "demo", where[1], 1, START + number, gone).write()


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds) of a command."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.monotonic() - begin
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        runs = Path(parent) / "runs"
        for number in range(arguments.runs):
            make_run(runs / f"run-{number}", number, steps=20, statuses=50)
        make_run(Path(parent) / "other" / "long", arguments.runs, LONG_STEPS, LONG_STATUSES)
        environment = {**os.environ, "HPC_GYM_RUNS": str(runs), "XDG_STATE_HOME": parent}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(parent)
        commands = [
            ["list"],
            ["list", "--limit", "0"],
            ["list", "--limit", "0", "--json"],
            ["status"],
            ["status", f"run-{arguments.runs // 2}", "--json"],
            ["status", "other/long"],
        ]
        rows = []
        for words in commands:
            command = [sys.executable, "-m", "hpc_gym.cli.main", *words]
            timed(command, environment)
            times = [timed(command, environment) for _ in range(arguments.repeats)]
            wall, cpu = statistics.median(each[0] for each in times), min(each[1] for each in times)
            rows.append(f"| `hpc-gym {' '.join(words)}` | {wall:.2f} s | {cpu:.2f} s |")
        size = (Path(parent) / "other" / "long" / "attempts" / "1" / "events.jsonl").stat().st_size / 1e6
    long = f"`long` has {LONG_STEPS:,} steps and an event log of {size:.0f} MB"
    head = f"{arguments.runs} past runs; {long}. Wanted: {WITHIN_S:g} s."
    table = ["| command | median time | least CPU time |", "|---|---|---|", *rows]
    record("Seeing", "\n".join([head, "", *table]))


if __name__ == "__main__":
    main()
