"""The arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gym.cli import completion

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
