"""The arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gym.cli import completion
from hpc_gym.errors import UserError

Experiment = Annotated[
    str,
    typer.Argument(help="A YAML file, or a name under configs/experiments.", autocompletion=completion.experiments),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to override, as in grpo.max_steps=100.")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Cluster profile in place of the experiment's own: a name under configs/clusters, or a file.",
        autocompletion=completion.clusters,
    ),
]
Job = Annotated[
    str,
    typer.Argument(help="A job id, a run name, a run directory, or 'latest'.", autocompletion=completion.jobs),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def refuse_two_outputs(follow: bool, as_json: bool) -> None:
    """Raises UserError where one JSON line and then a view for people would be written to the same output."""
    if follow and as_json:
        raise UserError(
            "--json prints one line for a program and --follow a view for people: choose one. To follow by a program: "
            "`hpc-gym status JOB --follow --json`."
        )
