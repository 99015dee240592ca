"""What is asked for, resolved and checked before anything is written: all that a dry run needs and imports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.resolve import resolve


@dataclass(frozen=True)
class Request:
    """A Plan to be submitted, and what is kept beside it for the reader."""

    plan: Plan
    experiment: str
    """What the user named: a file or the name of a shipped experiment."""
    resolved: Callable[[], str]
    """Makes the resolved experiment as YAML, which a dry run does not want."""
    cluster: str
    argv: tuple[str, ...] = ()


def prepare(
    experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None, name: str | None = None
) -> Request:
    """What `submit` would submit: resolved and checked, nothing written."""
    if isinstance(overrides, str):
        raise UserError(f"overrides must be a list of KEY=VALUE, such as ['grpo.max_steps=100'], not '{overrides}'.")
    named = [f"name={json.dumps(name)}"] if name is not None else []
    resolved = resolve(experiment, [*overrides, *named], cluster)
    refuse_existing(resolved.plan)
    return Request(
        plan=resolved.plan,
        experiment=str(experiment),
        resolved=resolved.experiment_yaml,
        cluster=cluster or resolved.plan.launch.kind,
        argv=tuple(sys.argv),
    )


def refuse_existing(plan: Plan) -> None:
    """Raises UserError when the run directory of `plan` exists."""
    if Path(plan.run_dir).exists():
        raise UserError(
            f"the run '{plan.name}' exists: {plan.run_dir}. Choose another name (name=... on the command line), "
            "or remove that directory when nothing in it is wanted."
        )
