"""`hpc-gym runtimes build` and `hpc-gym runtimes list`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from hpc_gym.cli.arguments import Json

app = typer.Typer(
    name="runtimes",
    help="Build and list the runtimes: the environments that the programs of each role run in.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


class Device(StrEnum):
    """What the programs compute on."""

    cpu = "cpu"
    cuda = "cuda"


def _names(incomplete: str) -> list[str]:
    from hpc_gym.runtimes.spec import names

    return [name for name in names() if name.startswith(incomplete)]


@app.command()
def build(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Runtimes to build; default: those of the device.", autocompletion=_names),
    ] = None,
    device: Annotated[Device, typer.Option(help="What the job computes on.")] = Device.cpu,
) -> None:
    """Build what is not there yet, side by side, from the locked requirement sets.

    Runtimes are kept in ~/.cache/hpc-gym, or in $HPC_GYM_CACHE: on a cluster, a folder that all nodes see. Each is
    built once, also when several people or jobs ask for it at the same time.

    \b
    hpc-gym runtimes build
    hpc-gym runtimes build --device cuda
    hpc-gym runtimes build gym
    """
    import signal

    from hpc_gym.cli.build_view import build_with_view
    from hpc_gym.runtimes.spec import default_names, spec_of

    chosen = tuple(dict.fromkeys(names or default_names(device.value)))
    for name in chosen:
        spec_of(name)
    # A terminated build leaves no program and no half runtime behind, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    build_with_view(chosen)


@app.command("list")
def list_runtimes(as_json: Json = False) -> None:
    """All runtimes that this hpc-gym uses, and older ones that are still there.

    \b
    hpc-gym runtimes list
    hpc-gym runtimes list --json | jq '.[] | select(.state == "outdated").path'
    """
    from hpc_gym.runtimes.inventory import inventory

    found = inventory()
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
        return
    rows = [("NAME", "STATE", "SIZE", "PYTHON", "LOCK", "PATH")]
    for each in found:
        size = f"{each.size_mib} MiB" if each.size_mib else ""
        rows.append((each.name, each.state, size, each.python, each.lock, each.path))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        typer.echo("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[5]]))
    if sys.stdout.isatty() and any(each.state == "not built" for each in found):
        typer.echo("`hpc-gym runtimes build` builds what a job on this machine needs.")
