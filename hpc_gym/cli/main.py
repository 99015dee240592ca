"""The command `hpc-gym`: its sub-commands are imported only when they are called, so that help and completion are fast.

Exit codes: 0 done, 1 the job or check failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hpc_gym.errors import UserError

_OF_A_FILE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE)
"""What a file or folder that somebody named may answer, at any of the many places that look at it."""


@dataclass(frozen=True)
class LazyCommand:
    """Where a sub-command lives: `attribute` of `module` is its function or, for a group, its Typer app."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "submit": LazyCommand("hpc_gym.cli.submit", "submit", "Submit an experiment as a job."),
    "status": LazyCommand("hpc_gym.cli.status", "status", "Where a job stands, in stages."),
    "logs": LazyCommand("hpc_gym.cli.logs", "logs", "All logs of a job, merged in time order."),
    "list": LazyCommand("hpc_gym.cli.list", "list_runs", "All runs, running and past."),
    "cancel": LazyCommand("hpc_gym.cli.cancel", "cancel", "Stop a job in good order."),
    "resume": LazyCommand("hpc_gym.cli.resume", "resume", "Go on with a run that has ended, from its last checkpoint."),
    "show": LazyCommand("hpc_gym.cli.show", "show", "The resolved experiment, and where each value comes from."),
    "check": LazyCommand("hpc_gym.cli.check", "check", "What would go wrong, before a node is waited for."),
    "runtimes": LazyCommand("hpc_gym.cli.runtimes", "app", "Build and list the runtimes that roles run in."),
    "demo": LazyCommand("hpc_gym.cli.demo", "demo", "Train a small model on two environments, on this machine."),
}


class LazyGroup(TyperGroup):
    """Knows every sub-command by name and summary; loads the one that is called, or whose arguments are completed."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, lazy in COMMANDS.items():
            self.add_command(TyperCommand(name, help=lazy.summary, rich_markup_mode=None))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else None, rest


def load(name: str) -> Any:
    """The sub-command of that name, ready to be invoked."""
    lazy = COMMANDS[name]
    target = getattr(importlib.import_module(lazy.module), lazy.attribute)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        app.command(name)(target)
        target = app
    return typer.main.get_command(target)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("hpc-gym"))
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Reinforcement-learning post-training of language models as HPC jobs.

    \b
    hpc-gym demo                               the whole thing at work, in minutes
    hpc-gym submit EXPERIMENT --dry-run        what would be submitted
    hpc-gym submit EXPERIMENT --follow         submit, and watch
    hpc-gym status | logs --follow             of the latest job, or of JOB
    hpc-gym cancel JOB | resume JOB            stop it | go on with it

    EXPERIMENT is a YAML file or a name under configs/experiments. JOB is a job id, a run name, a run directory, or
    'latest'. Every command has --help with examples.
    """


def application() -> typer.Typer:
    """The Typer app of `hpc-gym`."""
    app = typer.Typer(
        cls=LazyGroup,
        name="hpc-gym",
        rich_markup_mode=None,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return app


def run(arguments: list[str] | None = None) -> int:
    """Runs the command of `arguments` (default: the process's) and returns its exit code."""
    try:
        application()(args=arguments, prog_name="hpc-gym")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except UserError as error:
        sys.stderr.write(f"hpc-gym: {error}\n")
        return 2
    except OSError as error:
        if error.errno not in _OF_A_FILE or error.filename is None:
            raise
        sys.stderr.write(f"hpc-gym: {os.fsdecode(error.filename)}: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    """Entry point: runs the command and ends the process with its exit code."""
    # Imports make objects that stay: collecting among them, again at the end, takes a third of a dry run's time.
    gc.set_threshold(100_000, 20, 20)
    # pydantic looks through every installed package for plugins, which have nothing to say about an experiment.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = run()
        gc.freeze()
        if sys.stdout is not None:  # `>&-` closes it
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # The reader of our output went away, as `head` does: no message, also not from the flush at exit.
        if error.errno != errno.EPIPE:
            sys.stderr.write(f"hpc-gym: {error.strerror}: {error.filename or 'the output could not be written'}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
