"""`hpc-gym list`."""

from __future__ import annotations

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
    from hpc_gym.jobs.records import all_records
    from hpc_gym.jobs.state import standings

    records = all_records()
    shown = records[:limit] if limit else records
    found = standings(shown)
    state_of = {run_dir: standing.state for run_dir, standing in found.items()}
    if as_json:
        import dataclasses
        import json

        rows = [{"state": state_of[record.run_dir], **dataclasses.asdict(record)} for record in shown]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not records:
        typer.echo("No runs yet. `hpc-gym submit EXPERIMENT` makes one.")
        return
    table = [("NAME", "STATE", "SUBMITTED", "NODES", "JOB", "RUN DIRECTORY")]
    for record in shown:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted))
        table.append((record.name, state_of[record.run_dir], when, str(record.nodes), record.job_id, record.run_dir))
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for row in table:
        typer.echo("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[5]]))
    if len(shown) < len(records):
        typer.echo(f"... and {len(records) - len(shown)} more: hpc-gym list --limit 0")
