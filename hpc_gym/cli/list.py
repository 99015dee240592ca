"""`hpc-gym list`."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from hpc_gym.cli.arguments import Json


def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Show so many of the newest; 0: all.")] = 20,
    as_json: Json = False,
) -> None:
    """All runs, running and past, newest first.

    Runs are found in ./runs, in the folders of $HPC_GYM_RUNS, and wherever you have submitted jobs to.

    \b
    hpc-gym list
    hpc-gym list --limit 0 --json | jq '.[] | select(.state == "FAILED") | .name'
    """
    from hpc_gym.jobs.records import look
    from hpc_gym.jobs.state import last_attempt, standings

    runs = look()
    shown = runs.records[:limit] if limit else runs.records
    found = standings(shown)
    for sentence in runs.unreadable:
        typer.echo(f"not listed: {sentence}", err=True)
    if as_json:
        import dataclasses
        import json

        rows = []
        for record in shown:
            told = {**dataclasses.asdict(found[record.run_dir]), "attempt": last_attempt(record.run_dir)}
            rows.append({**told, **dataclasses.asdict(record)})
        typer.echo(json.dumps(rows, indent=1))
        return
    if not runs.records:
        typer.echo("No runs yet. `hpc-gym submit EXPERIMENT` makes one.")
        return
    table = [("NAME", "STATE", "SUBMITTED", "NODES", "ATTEMPT", "JOB", "RUN DIRECTORY")]
    for record in shown:
        standing = found[record.run_dir]
        why = f" ({re.split('[ ,]', standing.waiting)[0]})" if standing.waiting else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted))
        attempt = str(last_attempt(record.run_dir) or "")
        cells = (record.name, standing.state + why, when, str(record.nodes), attempt, record.job_id, record.run_dir)
        table.append(cells)
    widths = [max(len(row[column]) for row in table) for column in range(6)]
    for row in table:
        typer.echo("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[6]]))
    if len(shown) < len(runs.records):
        typer.echo(f"... and {len(runs.records) - len(shown)} more: hpc-gym list --limit 0")
