"""The options that vLLM, TRL and DeepSpeed accept, and what nemo-gym ships, as tables read from the locked runtimes.

`python -m hpc_gym.runtimes.extract` makes the tables. Reading one takes a few milliseconds and imports none of the
programs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

Section = Literal["vllm", "grpo", "deepspeed"]

_TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Option:
    """One option by the name that YAML has for it."""

    name: str
    type: str
    """A union of `bool int float str list dict null`, joined by "|"; "" where any value may stand."""
    choices: tuple[Any, ...] | None
    """The only values allowed; None: any of the type."""
    default: Any
    """What the program takes where nothing is given; a value that JSON has no form for is told as `<its type>`."""
    help: str
    flag: str = ""
    """vLLM's own flag (`--max-model-len`)."""
    negatable: bool = False
    """Whether vLLM knows `--no-...` for it: a flag that is not negatable is left out to say false."""
    fields: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}))
    """Options inside this one (DeepSpeed's sections); empty where the program does not declare them."""


@functools.cache
def table(section: Section) -> Mapping[str, Option]:
    """The options of `vllm serve`, of TRL's GRPOConfig, or of DeepSpeed's configuration."""
    return _options(_read(section)["options"])


def source(name: Section | Literal["gym"]) -> Mapping[str, str]:
    """The programs and versions that a table was read from."""
    versions: Mapping[str, str] = _read(name)["source"]
    return versions


@dataclass(frozen=True)
class GymConfig:
    """A configuration that ships in the nemo-gym wheel."""

    path: str
    """As `config_paths` names it."""
    instances: Mapping[str, str]
    """The server instances it defines, with their types: `resources_servers`, `responses_api_agents`, ..."""
    servers: tuple[str, ...]
    """The server programs those instances run, as `TYPE/NAME`."""
    models: tuple[str, ...]
    """The model server instances it refers to: `policy_model`, and others where it needs a judge."""
    parents: tuple[str, ...]
    """Its own `config_paths`."""
    data: tuple[str, ...]
    """Dataset files that it names and that ship in the wheel."""
    missing: tuple[str, ...]
    """Requirements of its servers that the gym runtime does not have."""


@functools.cache
def gym_configs() -> Mapping[str, GymConfig]:
    """The configurations in the nemo-gym wheel, by path."""
    tree = _read("gym")
    needs: Mapping[str, Mapping[str, list[str]]] = tree["servers"]
    configs = {}
    for path, entry in tree["configs"].items():
        instances: Mapping[str, Mapping[str, Any]] = entry["instances"]
        servers = sorted({f"{each['type']}/{server}" for each in instances.values() for server in each["servers"]})
        configs[path] = GymConfig(
            path=path,
            instances={name: each["type"] for name, each in instances.items()},
            servers=tuple(servers),
            models=tuple(entry["models"]),
            parents=tuple(entry["parents"]),
            data=tuple(entry["data"]),
            missing=tuple(sorted({line for server in servers for line in needs.get(server, {}).get("missing", [])})),
        )
    return configs


def gym_servers() -> Mapping[str, tuple[str, ...]]:
    """The server programs in the nemo-gym wheel, as `TYPE/NAME`, with those of their requirements that the gym runtime
    does not have.
    """
    return {name: tuple(entry["missing"]) for name, entry in _read("gym")["servers"].items()}


def _options(entries: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Option]:
    return {
        name: Option(
            name=name,
            type=entry["type"],
            choices=tuple(entry["choices"]) if entry["choices"] is not None else None,
            default=entry["default"],
            help=entry["help"],
            flag=entry.get("flag", ""),
            negatable=entry.get("negatable", False),
            fields=_options(entry.get("fields", {})),
        )
        for name, entry in entries.items()
    }


def _read(name: str) -> Mapping[str, Any]:
    tree: Mapping[str, Any] = json.loads((_TABLES / f"{name}.json").read_text())
    return tree
