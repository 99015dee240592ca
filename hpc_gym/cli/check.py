"""`hpc-gym check`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from hpc_gym.cli.arguments import Cluster, Experiment, Json, Overrides

if TYPE_CHECKING:
    from hpc_gym.jobs.findings import Finding


def check(experiment: Experiment, overrides: Overrides = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Everything that can be found wrong before a node is waited for. Run it on a login node of the cluster.

    Looks at experiment, runtimes, model, data and storage; in Slurm at partition, account, time limit and size, when
    the job would start and what it costs. Exit code 1 when a check failed, 2 when the experiment itself is wrong.

    \b
    hpc-gym check five-node --cluster my-site
    hpc-gym check sums.yaml --json | jq '.[] | select(.status != "ok")'
    """
    from hpc_gym.jobs.check import check_experiment

    findings = check_experiment(experiment, overrides or (), cluster)
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(each) for each in findings], indent=1))
    else:
        _show(findings)
    if any(each.status == "failed" for each in findings):
        raise typer.Exit(1)


def _show(findings: Sequence[Finding]) -> None:
    """The findings in three columns. On a terminal the last is wrapped between words, so that a path stays whole;
    elsewhere each is one line.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    width = max(len(each.check) for each in findings)
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    for each in findings:
        first, *others = [each.detail]
        if console.is_terminal:
            room = max(30, console.width - width - 11)
            first, *others = textwrap.wrap(each.detail, room, break_long_words=False, break_on_hyphens=False) or [""]
        line = Text(f"{each.check:<{width}}  ").append(f"{each.status:<7}", colours[each.status]).append(f"  {first}")
        console.print(line, *(" " * (width + 11) + other for other in others), sep="\n", soft_wrap=True, markup=False)
    counts = {status: sum(each.status == status for each in findings) for status in ("failed", "warning")}
    if counts["failed"]:
        told = f"\nNot ready: {counts['failed']} failed, {counts['warning']} to look at."
    else:
        told = "\nReady to submit" + (f"; {counts['warning']} to look at." if counts["warning"] else ".")
    console.print(Text(told, "red" if counts["failed"] else "green"))
