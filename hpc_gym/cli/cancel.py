"""`hpc-gym cancel`."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gym.cli.arguments import Job, Json


def cancel(
    job: Job,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until nothing of the job is left.")] = True,
    as_json: Json = False,
) -> None:
    """Stop a job in good order: a checkpoint that is being written is let finish, then every process is stopped.

    Exit code 1 when something of the job is left.

    \b
    hpc-gym cancel latest
    hpc-gym cancel 4711 --no-wait
    """
    from hpc_gym.jobs import records
    from hpc_gym.jobs.cancellation import cancel as cancel_job

    record = records.find(job, only=True)
    if wait and not as_json:
        typer.echo(f"Stopping job {record.job_id} ({record.run_dir}) ...", err=True)
    told = cancel_job(record, wait)
    if as_json:
        import json

        typer.echo(json.dumps({"job_id": record.job_id, "gone": told.gone, "sentence": told.sentence}))
    else:
        typer.echo(f"{told.sentence[:1].upper()}{told.sentence[1:]}.")
    raise typer.Exit(0 if told.gone or not wait else 1)
