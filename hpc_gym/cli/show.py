"""`hpc-gym show`: the resolved experiment, and which file or override set a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_gym.cli.arguments import Cluster, Experiment, Json, Overrides
from hpc_gym.errors import UserError

if TYPE_CHECKING:
    from hpc_gym.plan.resolve import Described


def show(
    experiment: Experiment,
    overrides: Overrides = None,
    cluster: Cluster = None,
    why: Annotated[str | None, typer.Option(metavar="KEY", help="Tell who set KEY (or what is below it).")] = None,
    as_json: Json = False,
) -> None:
    """The resolved experiment as YAML, or with --why where a value comes from.

    An experiment that cannot be submitted yet, for a file that is missing or numbers that do not go together, is shown
    all the same; then what is wrong is said, and the exit code is 2.

    \b
    hpc-gym show demo
    hpc-gym show demo grpo.max_steps=50 --why grpo.max_steps
    """
    from hpc_gym.plan.resolve import NotReadyError, resolve

    try:
        _show(resolve(experiment, overrides or (), cluster), why, as_json)
    except NotReadyError as error:
        _show(error.described, why, as_json)
        raise


def _show(described: Described, why: str | None, as_json: bool) -> None:
    if why is None:
        _print_experiment(described, as_json)
        return
    entries = explain(described, why)
    if as_json:
        import json

        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        _print_table(entries)


def explain(described: Described, key: str) -> list[dict[str, Any]]:
    """Per value at or below `key`: `key`, `value`, `set_by`, and `overrode`, what it replaced, newest first.

    Raises UserError naming the nearest keys when there is none.
    """
    from hpc_gym.config.problems import nearest
    from hpc_gym.config.provenance import key_text

    tree = described.experiment.model_dump(mode="json")
    path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    leaves = _leaves(tree, ())
    found = [(leaf, value) for leaf, value in leaves if leaf[: len(path)] == path]
    if not found:
        raise UserError(f"--why {key}: no such key; {nearest(key, [key_text(leaf) for leaf, _ in leaves])}")
    entries = []
    for leaf, value in found:
        history = described.provenance.history(leaf)
        entries.append(
            {
                "key": key_text(leaf),
                "value": value,
                "written": history[-1].value if history and history[-1].value != value else None,
                "set_by": history[-1].where
                if history
                else described.provenance.where(leaf)
                if _inside(described, leaf)
                else "default",
                "overrode": [{"value": each.value, "set_by": each.where} for each in reversed(history[:-1])],
            }
        )
    return entries


def _inside(described: Described, leaf: tuple[Any, ...]) -> bool:
    """Whether the leaf is part of a list or section that was given as a whole."""
    origin = described.provenance.origin(leaf)
    return origin is not None and not isinstance(origin.value, dict)


def _leaves(value: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any]]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not items:
        return [(path, value)]
    return [found for key, item in items for found in _leaves(item, (*path, key))]


def _print_experiment(described: Described, as_json: bool) -> None:
    text = described.experiment_yaml()
    if as_json:
        import json

        import yaml

        text = json.dumps(yaml.safe_load(text), indent=1, ensure_ascii=False)
    typer.echo(text.rstrip("\n"))


def _print_table(entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        # Nothing is folded where a program reads.
        console = Console(width=10_000)
    table = Table(box=None, pad_edge=False)
    for title in ("key", "value", "set by", "which overrode"):
        table.add_column(title, overflow="fold")
    for entry in entries:
        value = f"{entry['value']}" if entry["written"] is None else f"{entry['value']}  (written {entry['written']})"
        overrode = "\n".join(f"{each['value']} ({each['set_by']})" for each in entry["overrode"])
        table.add_row(*(Text(str(cell)) for cell in (entry["key"], value, entry["set_by"], overrode)))
    console.print(table)
