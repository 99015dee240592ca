"""`hpc-gym logs`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from hpc_gym.cli.arguments import Job


def logs(
    job: Job = "latest",
    role: Annotated[str | None, typer.Option(help="Only of this role: rollout, train, ...")] = None,
    node: Annotated[str | None, typer.Option(help="Only of this node: train-1, or 1.")] = None,
    process: Annotated[str | None, typer.Option(help="Only of this process: vllm-0, gym, rank-3, ...")] = None,
    attempt: Annotated[int | None, typer.Option(help="Only of this attempt, from 1.")] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Tracebacks and errors with the lines around them, the first cause first.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Also what is written from now on, until the job ends.")
    ] = False,
    color: Annotated[
        bool | None, typer.Option("--color/--no-color", help="Colour by role; default: when shown on a terminal.")
    ] = None,
) -> None:
    """All logs of a job merged in time order: role, node, process, time (UTC), and the line.

    The last line says how the job ended.

    \b
    hpc-gym logs --follow
    hpc-gym logs demo --role rollout --process gym
    hpc-gym logs 4711 --errors
    """
    # Threads for matrices as small as a log's stamps only cost, and hold memory. Said before numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from pathlib import Path

    from hpc_gym.errors import UserError
    from hpc_gym.jobs import logs as job_logs
    from hpc_gym.jobs import records
    from hpc_gym.jobs.log_files import Selection, refuse_unknown
    from hpc_gym.jobs.state import JobWatch

    if errors and follow:
        raise UserError("--errors looks back and --follow ahead: choose one")
    record = records.find(job)
    run_dir, selection = Path(record.run_dir), Selection(role, node, process, attempt)
    refuse_unknown(run_dir, selection)
    # https://no-color.org
    wanted = (sys.stdout.isatty() and not os.environ.get("NO_COLOR")) if color is None else color
    if errors:
        pieces = job_logs.errors(run_dir, selection, wanted)
    elif follow:
        pieces = job_logs.logs(run_dir, selection, ended=JobWatch(record).ended, color=wanted)
    else:
        pieces = job_logs.logs(run_dir, selection, color=wanted)
    if not _written(pieces, at_once=follow):
        what = "no errors" if errors else "no lines"
        state = JobWatch(record).state()
        sys.stderr.write(f"hpc-gym: {what} in the logs of job {record.job_id}, which is {state}.\n")


def _written(pieces: Iterable[bytes], at_once: bool) -> bool:
    """Writes the pieces to stdout, each `at_once` where somebody looks on; whether there were any."""
    out, some = sys.stdout.buffer, False
    for piece in pieces:
        some = True
        out.write(piece)
        if at_once:
            out.flush()
    out.flush()
    return some
