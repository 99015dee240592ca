"""`hpc-gym check`."""

from __future__ import annotations

import typer

from hpc_gym.cli.arguments import Cluster, Experiment, Json, Overrides


def check(experiment: Experiment, overrides: Overrides = None, cluster: Cluster = None, as_json: Json = False) -> None:
    """Everything that can be found wrong before a node is waited for. Run it on a login node of the cluster.

    Looks at experiment, runtimes, model, data and storage; in Slurm at partition, account, time limit and size, when
    the job would start and what it costs. Exit code 1 when a check failed, 2 when the experiment itself is wrong.

    \b
    hpc-gym check five-node --cluster my-site
    hpc-gym check workplace.yaml grpo.max_steps=10 --json | jq '.[] | select(.status != "ok")'
    """
    from hpc_gym.jobs.check import check_experiment

    findings = check_experiment(experiment, overrides or (), cluster)
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(each) for each in findings], indent=1))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for title in ("check", "", "finding"):
            table.add_column(title, overflow="fold")
        colours = {"ok": "green", "warning": "yellow", "failed": "red"}
        for each in findings:
            table.add_row(each.check, Text(each.status, colours[each.status]), Text(each.detail))
        console = Console(highlight=False)
        console.print(table)
        counts = {status: sum(each.status == status for each in findings) for status in ("failed", "warning")}
        if counts["failed"]:
            told = f"\nNot ready: {counts['failed']} failed, {counts['warning']} to look at."
        else:
            told = "\nReady to submit" + (f"; {counts['warning']} to look at." if counts["warning"] else ".")
        console.print(Text(told, "red" if counts["failed"] else "green"))
    if any(each.status == "failed" for each in findings):
        raise typer.Exit(1)
