"""Secrets that an experiment writes where others read them: in the Plan, the job script, or the experiment itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hpc_gym.config.problems import Problem
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.schema import Experiment
from hpc_gym.config.secret_names import ADVICE, is_secret, set_by

_PLACEHOLDERS = frozenset({"empty", "none", "dummy", "dummy_key", "-"})
"""What is written, by vLLM's and NeMo Gym's own examples too, where a server asks for no key."""


def secret_problems(experiment: Experiment) -> Iterable[Problem]:
    """Each secret, at the key where it is written."""
    cluster = experiment.cluster
    sections: list[tuple[KeyPath, Mapping[str, str]]] = [(("cluster", "env"), cluster.env)]
    sections += [(("cluster", "role_env", role), variables) for role, variables in cluster.role_env.items()]
    for path, variables in sections:
        for name in variables:
            if is_secret(name) or name in experiment.secrets:
                yield Problem((*path, name), f"would stand in plan.json, where others read it: {ADVICE}.")
    for index, line in enumerate(cluster.setup):
        for name in set_by(line):
            yield Problem(
                ("cluster", "setup", index), f"would show {name} in the job script, where others read it: {ADVICE}."
            )
    free: list[tuple[KeyPath, Any]] = [(("vars",), experiment.vars)]
    free += [(("environments", name, "config"), each.config) for name, each in experiment.environments.items()]
    for path, value in free:
        yield from _in_values(path, value, experiment.secrets)


def _in_values(path: KeyPath, value: Any, secrets: list[str]) -> Iterator[Problem]:
    """Secrets in a section of the user's own keys. An interpolation that is left to NeMo Gym says nothing yet."""
    name = str(path[-1])
    if isinstance(value, str):
        written = value and "${" not in value and value.lower() not in _PLACEHOLDERS
        if written and (is_secret(name) or name in secrets):
            variable = name if name in secrets else name.upper()
            yield Problem(
                path,
                f"would stand in the run directory, where others read it: {ADVICE}. With secrets: [{variable}], write "
                f"\\${{oc.env:{variable}}} here: NeMo Gym reads it on the nodes.",
            )
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _in_values((*path, key), item, secrets)
