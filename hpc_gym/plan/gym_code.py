"""The code of NeMo Gym's servers: in the nemo-gym wheel, or in folders of the user's own, laid out as NeMo Gym has them
(`resources_servers/NAME/app.py` with a `requirements.txt`, `configs/` beside it or anywhere below).

NeMo Gym 0.4 looks for a server's folder below its working directory first, then beside itself, and starts it in the
venv `uv_venv_dir/KIND/NAME/.venv` (`nemo_gym.cli.env`, `nemo_gym.cli.setup_command`). So servers of one's own get a
working directory with links to them, and a folder of venvs in which theirs are the gym runtime too.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_gym.config.provenance import display
from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Link, Runtime
from hpc_gym.runtimes.options import gym_servers, source
from hpc_gym.runtimes.spec import spec_of

KINDS = ("resources_servers", "responses_api_agents", "responses_api_models")
WORKING_DIRECTORY = "{private_dir}/gym"
"""Of NeMo Gym, where it has servers of the user's own."""
_ALWAYS = "responses_api_models/vllm_model"
"""The policy's model server, and a judge's."""


@dataclass(frozen=True)
class Code:
    """The server programs of a configuration, as `KIND/NAME`; `own` maps those outside nemo-gym to their folders."""

    servers: frozenset[str] = frozenset()
    own: Mapping[str, str] = field(default_factory=dict)


def code_of(tree: Mapping[str, Any], file: Path) -> tuple[Code, list[str]]:
    """Where the code of the servers is that the configuration `file` defines, and what is wrong with it."""
    own: dict[str, str] = {}
    problems: list[str] = []
    servers = {
        f"{kind}/{name}": str(settings.get("entrypoint") or "app.py") if isinstance(settings, Mapping) else "app.py"
        for value in tree.values()
        for kind in KINDS
        if isinstance(value, Mapping) and isinstance(value.get(kind), Mapping)
        for name, settings in value[kind].items()
    }
    for server, entrypoint in servers.items():
        folder = next((root / server for root in file.parents if (root / server / entrypoint).is_file()), None)
        if folder is not None:
            own[server] = str(folder)
            problems += _of_own(folder)
        elif server in gym_servers():
            problems += missing(gym_servers()[server])
        else:
            problems.append(
                f"there is no code for its server '{server}': nemo-gym {source('gym')['nemo-gym']} has none of that "
                f"name, and no folder around {display(file)} has {server}/{entrypoint}."
            )
    return Code(frozenset(servers), own), problems


def _of_own(folder: Path) -> Iterable[str]:
    """What NeMo Gym, or the gym runtime, would have against a server's folder of the user's own."""
    requirements, project = folder / "requirements.txt", folder / "pyproject.toml"
    if requirements.is_file() == project.is_file():
        yield (
            f"{display(folder)} must have one of requirements.txt and pyproject.toml, if only an empty one: by that "
            "NeMo Gym knows a server's folder."
        )
        return
    try:
        if requirements.is_file():
            lines = [line.partition("#")[0].strip() for line in requirements.read_text().splitlines()]
        else:
            lines = tomllib.loads(project.read_text()).get("project", {}).get("dependencies", [])
    except (OSError, ValueError) as error:
        raise UserError(f"{display(folder)}: its requirements cannot be read: {error}.") from None
    yield from missing(line for line in lines if line and not line.startswith("-"))


def missing(requirements: Iterable[str]) -> Iterable[str]:
    """A sentence where the gym runtime lacks packages that servers require."""
    # A package that is there in another version than the server pins may well do; one that is not there does not.
    absent = [line for line in requirements if _package(line) not in _locked_packages()]
    if absent:
        yield (
            f"its servers need {', '.join(absent)}, which the gym runtime does not have (locks/gym.txt): take another "
            "environment, or add them to locks/gym.in in a checkout of hpc-gym, run `make locks` and build the runtime."
        )


def links(servers: Iterable[str], own: Mapping[str, str], runtime: Runtime) -> tuple[Link, ...]:
    """What makes NeMo Gym find `own` and run all of `servers` in the gym runtime."""
    found = [Link(f"{WORKING_DIRECTORY}/{server}", folder) for server, folder in sorted(own.items())]
    mixed = {server.partition("/")[0] for server in own}
    for kind in KINDS:
        if kind not in mixed:
            found.append(Link(f"{venvs(own, runtime)}/{kind}", f"{runtime.folder}/servers/{kind}"))
    for server in sorted({*servers, _ALWAYS}):
        if server.partition("/")[0] in mixed:
            found.append(Link(f"{venvs(own, runtime)}/{server}/.venv", runtime.folder))
    return tuple(found)


def venvs(own: Mapping[str, str], runtime: Runtime) -> str:
    """NeMo Gym's `uv_venv_dir`."""
    return f"{WORKING_DIRECTORY}/venvs" if own else f"{runtime.folder}/servers"


@functools.cache
def _locked_packages() -> frozenset[str]:
    return frozenset(_package(line) for line in spec_of("gym").lock.splitlines())


def _package(requirement: str) -> str:
    """Name of the package that a line of a requirements file asks for; an editable path is nemo-gym itself."""
    if requirement.startswith("-e ."):
        return "nemo-gym"
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else requirement
