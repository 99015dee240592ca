"""NeMo Gym as the Plan sees it: its configurations, which may lie in the gym runtime, and the file that starts its
servers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.config.compose import Composed
from hpc_gym.config.document import read_document
from hpc_gym.config.problems import Problem
from hpc_gym.config.provenance import display
from hpc_gym.config.schema import Environment
from hpc_gym.errors import UserError

INSIDE = "nemo_gym:"
"""Prefix of a path inside the nemo-gym package."""
POLICY_CONFIG = "responses_api_models/vllm_model/configs/vllm_model.yaml"
"""NeMo Gym's model server for an endpoint that speaks vLLM's chat completions. It is called `policy_model`."""
API_KEY = "unused"
"""NeMo Gym puts the key on its servers' command lines, so it must be none: a rollout's tag is what opens the
endpoint.
"""

_KINDS = ("resources_servers", "responses_api_agents", "responses_api_models")


@dataclass(frozen=True)
class Gym:
    """An installed nemo-gym. `packages` is its site-packages; None: the runtime is not built, so nothing can be
    looked up.
    """

    packages: Path | None
    root: Path

    @classmethod
    def of(cls, root: Path) -> Gym:
        """The nemo-gym of the runtime in the folder `root`, built or not."""
        found = sorted(root.glob("lib/python3.*/site-packages/nemo_gym/__init__.py"))
        return cls(found[0].parent.parent if found else None, root)

    def config_names(self) -> list[str]:
        """Every environment configuration that it ships, as `config_paths` names it."""
        if self.packages is None:
            return []
        patterns = ("environments/*/config.yaml", "resources_servers/*/configs/*.yaml", "benchmarks/*/config.yaml")
        files = (file for pattern in patterns for file in self.packages.glob(pattern))
        return sorted(str(file.relative_to(self.packages)) for file in files)


@dataclass(frozen=True)
class Served:
    """An environment with what its configurations define. `instances` maps a server instance to its kind."""

    config_paths: tuple[str, ...]
    agent: str
    instances: Mapping[str, str]
    settings: Mapping[str, Any]
    """The configurations merged, to compare environments that share server instances."""


def serve(name: str, environment: Environment, composed: Composed, gym: Gym) -> tuple[Served | None, list[Problem]]:
    """Looks up the environment's configurations and its agent."""
    paths: list[str] = []
    problems: list[Problem] = []
    settings: dict[str, Any] = {}
    known = True
    for index, written in enumerate(environment.config_paths):
        key = ("environments", name, "config_paths", index)
        try:
            path, file = _config_file(written, composed.folder_of(key), gym)
        except UserError as error:
            problems.append(Problem(key, str(error)))
            continue
        paths.append(path)
        if file is None:
            known = False
            continue
        try:
            settings = _merged(settings, read_document(file).tree)
        except UserError as error:
            problems.append(Problem(key, str(error)))
    settings = _merged(settings, environment.config)
    instances = dict(_instances(settings))
    agents = [key for key, kind in instances.items() if kind == "responses_api_agents"]
    if problems:
        return None, problems
    agent, problems = _agent(name, environment, agents, known, gym)
    return Served(tuple(paths), agent, instances, settings), problems


def clashes(served: Mapping[str, Served]) -> list[Problem]:
    """Environments that define one server instance differently: NeMo Gym would merge them without a word."""
    problems = []
    first: dict[str, str] = {}
    for name, environment in served.items():
        for instance in environment.instances:
            other = first.setdefault(instance, name)
            if other != name and served[other].settings[instance] != environment.settings[instance]:
                problems.append(
                    Problem(
                        ("environments", name),
                        f"its server '{instance}' is defined otherwise by the environment '{other}', and NeMo Gym "
                        "knows servers by that name alone: rename it in one of them.",
                    )
                )
    return problems


def data_file(written: str, folder: Path, gym: Gym) -> Path:
    """The file of dataset rows that `written` means.

    Raises UserError when it lies in a nemo-gym that is not built.
    """
    if not written.startswith(INSIDE):
        return (folder / Path(written).expanduser()).resolve()
    if gym.packages is None:
        raise UserError(f"'{written}' lies in the gym runtime, which is not built: run `hpc-gym runtimes build`.")
    return gym.packages / written.removeprefix(INSIDE)


def node_config(config: Iterable[Mapping[str, Any]], servers: str, model_name: str) -> str:
    """What a rollout node adds to the environments' own configurations, as YAML with placeholders.

    It comes last of all configurations, and so wins over them. `servers` is NeMo Gym's `uv_venv_dir`.
    """
    import yaml

    settings: dict[str, Any] = {}
    for more in config:
        settings = _merged(settings, more)
    settings |= {
        "policy_base_url": "http://127.0.0.1:{port:policy}/v1",
        "policy_api_key": API_KEY,
        "policy_model_name": model_name,
        # Every server runs in the gym runtime, so that nothing is installed when they start.
        "skip_venv_if_present": True,
        "uv_venv_dir": servers,
        "default_host": "127.0.0.1",
        "head_server": {"host": "127.0.0.1", "port": "{port:gym-head}"},
        "port_range_low": "{port:gym}",
        "port_range_high": "{port:gym+99}",
    }
    text: str = yaml.safe_dump(settings, sort_keys=True, allow_unicode=True, default_flow_style=False)
    # Ports are numbers to NeMo Gym: what the dump quotes as text is filled in as a number.
    for placeholder in ("{port:gym-head}", "{port:gym}", "{port:gym+99}"):
        text = text.replace(f"'{placeholder}'", placeholder)
    return text


def _config_file(written: str, folder: Path, gym: Gym) -> tuple[str, Path | None]:
    """The path as NeMo Gym is told it, and the file; no file when it would lie in a runtime that is not built."""
    inside = written.removeprefix(INSIDE)
    own = (folder / Path(written).expanduser()).resolve()
    if inside == written and own.is_file():
        return str(own), own
    if Path(written).is_absolute() or written.startswith((".", "~")):
        raise UserError(f"there is no file {display(own)}.")
    if gym.packages is None:
        return inside, None
    if (gym.packages / inside).is_file():
        return inside, gym.packages / inside
    names = gym.config_names()
    close = difflib.get_close_matches(inside, names, n=3, cutoff=0.5) or names[:3]
    raise UserError(
        f"NeMo Gym has no configuration '{inside}', and there is no file {display(own)}; "
        f"nearest in nemo-gym: {', '.join(close)}. Any `environments/NAME/config.yaml` or "
        "`resources_servers/NAME/configs/FILE.yaml` of nemo-gym may stand here."
    )


def _agent(name: str, environment: Environment, agents: list[str], known: bool, gym: Gym) -> tuple[str, list[Problem]]:
    key = ("environments", name, "agent")
    if environment.agent is not None:
        if known and environment.agent not in agents:
            close = difflib.get_close_matches(environment.agent, agents, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(agents) or 'none'}."
            return "", [Problem(key, f"'{environment.agent}' is no agent of this environment; {hint}")]
        return environment.agent, []
    if not known:
        return "", [
            Problem(
                key[:2], "name its agent, or run `hpc-gym runtimes build`, so that it can be looked up in nemo-gym."
            )
        ]
    if len(agents) == 1:
        return agents[0], []
    if not agents:
        return "", [Problem(key[:2], "its config_paths define no agent (a server under `responses_api_agents`).")]
    return "", [Problem(key[:2], f"its config_paths define several agents: set agent to one of {', '.join(agents)}.")]


def _instances(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            for kind in _KINDS:
                if kind in value:
                    yield key, kind


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(first)
    for key, value in second.items():
        mine = result.get(key)
        result[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result
