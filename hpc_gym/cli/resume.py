"""`hpc-gym resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gym.cli.arguments import Job, Json, Overrides, refuse_two_outputs
from hpc_gym.cli.submit import say_chain


def resume(
    job: Job,
    overrides: Overrides = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Show its stages, steps and errors until it ends. Ctrl-C detaches: it goes on."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Go on with a run that has ended, from its last checkpoint: same directory, same code, same order of the data.

    \b
    hpc-gym resume latest
    hpc-gym resume workplace nodes.rollout=2 cluster.slurm.time=48:00:00
    hpc-gym resume workplace nodes.train=4
    hpc-gym resume workplace grpo.max_steps=2000

    With another number of training ranks a step stays what it was: the batch of a rank is changed for it. A run that is
    complete goes on when it gets more steps.
    """
    from hpc_gym.jobs.resume import prepare_resumption, submit_resumption

    refuse_two_outputs(follow, as_json)
    resumption = prepare_resumption(job, overrides or ())
    resumed = submit_resumption(resumption)
    if as_json:
        import json

        facts = {"job_id": resumed.job_id, "name": resumed.record.name, "run_dir": str(resumed.run_dir)}
        step = resumption.saved.step if resumption.saved else 0
        told = {"from_step": step, "adapted": dict(resumption.adapted), "chain": resumed.record.chain}
        typer.echo(json.dumps(facts | told))
    else:
        for sentence in resumption.told:
            typer.echo(sentence)
        typer.echo(f"Submitted job {resumed.job_id}, which goes on with {resumed.run_dir} {resumption.where}.")
        say_chain(resumed.record)
    if follow:
        from hpc_gym.cli.live import follow_job

        raise typer.Exit(follow_job(resumed.record, with_logs=True))
