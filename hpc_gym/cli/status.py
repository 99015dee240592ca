"""`hpc-gym status`."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gym.cli.arguments import Job, Json


def status(
    job: Job = "latest",
    follow: Annotated[
        bool, typer.Option("--follow", "--watch", "-f", help="Show it live until the job ends. Ctrl-C leaves the view.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Where a job stands, in stages: from the queue to the exported model.

    With --follow the exit code is 1 when the job fails.

    \b
    hpc-gym status
    hpc-gym status demo --follow
    hpc-gym status 4711 --json | jq .stages
    """
    from hpc_gym.jobs import records
    from hpc_gym.jobs.status import read_status

    record = records.find(job)
    if follow:
        from hpc_gym.cli.live import follow_job

        raise typer.Exit(follow_job(record, as_json=as_json))
    told = read_status(record)
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps(dataclasses.asdict(told), indent=1))
        return
    from rich.console import Console

    from hpc_gym.cli.status_view import plain, view

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(view(told, encoding=console.encoding, width=console.width))
    else:
        typer.echo(plain(told), nl=False)
