"""`hpc-gym submit`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_gym.cli.arguments import Cluster, Experiment, Json, Overrides, refuse_two_outputs

if TYPE_CHECKING:
    from hpc_gym.jobs.job import HpcgymJob
    from hpc_gym.jobs.records import JobRecord


def submit(
    experiment: Experiment,
    overrides: Overrides = None,
    cluster: Cluster = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job script that would be submitted; write and submit nothing.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Show stages and telling log lines until it ends. Ctrl-C detaches; the job goes on."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit an experiment as a job.

    Prints the job id and the run directory. Exit code 2 when something is wrong with the request; with --follow, 1 when
    the job fails.

    \b
    hpc-gym submit demo --follow
    hpc-gym submit sums.yaml name=two grpo.learning_rate=1e-5 --cluster my-site
    hpc-gym submit demo --dry-run | less
    """
    # Early mistakes must not wait for what only a real submit imports.
    from hpc_gym.jobs.request import prepare

    refuse_two_outputs(follow, as_json)
    request = prepare(experiment, overrides or (), cluster)
    if dry_run:
        from hpc_gym.jobs.rendering import render

        sys.stdout.write(render(request.plan))
        return
    from hpc_gym.jobs.submit import submit_prepared

    job = submit_prepared(request)
    if as_json:
        import json

        told = {"job_id": job.job_id, "name": job.record.name, "run_dir": str(job.run_dir)}
        typer.echo(json.dumps(told | {"chain": job.record.chain}))
    else:
        _say(job, follow)
    if follow:
        from hpc_gym.cli.live import follow_job

        raise typer.Exit(follow_job(job.record, with_logs=True))


def say_chain(record: JobRecord) -> None:
    """Names all jobs of a chain, which somebody would otherwise look for in the queue, and cancel one by one."""
    if record.chain:
        typer.echo(
            f"It is a chain of jobs, each to go on where the one before stops: {', '.join(record.job_ids)}. "
            f"`hpc-gym cancel {record.name}` stops all."
        )


def _say(job: HpcgymJob, follow: bool) -> None:
    record = job.record
    typer.echo(f"Submitted job {record.job_id} ({record.nodes} nodes, {record.kind}).")
    say_chain(record)
    typer.echo(f"Run directory: {record.run_dir}")
    if not follow:
        typer.echo(f"Next: hpc-gym status {record.name} --follow | hpc-gym logs {record.name} --follow")
        typer.echo(f"      hpc-gym cancel {record.name}")
