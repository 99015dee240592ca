"""NeMo Gym as the Plan sees it: its configurations, which may lie in the gym runtime, and the file that starts its
servers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hpc_gym.config.compose import Composed
from hpc_gym.config.problems import Problem
from hpc_gym.config.provenance import display
from hpc_gym.config.schema import Environment
from hpc_gym.errors import UserError
from hpc_gym.plan.gym_code import KINDS, Code, code_of, missing
from hpc_gym.runtimes.options import gym_configs, source

INSIDE = "nemo_gym:"
"""Prefix of a path inside the nemo-gym package."""
POLICY_CONFIG = "responses_api_models/vllm_model/configs/vllm_model.yaml"
"""NeMo Gym's model server for an endpoint that speaks vLLM's chat completions. It is called `policy_model`."""
POLICY = "policy_model"
JUDGE = "judge_model"
"""What most of NeMo Gym's environments call the model server that judges."""
API_KEY = "unused"
"""NeMo Gym puts the key on its servers' command lines, so it must be none: a rollout's tag is what opens the
endpoint.
"""


@dataclass(frozen=True)
class Gym:
    """An installed nemo-gym. `packages` is its site-packages; None: the runtime is not built."""

    packages: Path | None

    @classmethod
    def of(cls, root: Path) -> Gym:
        """The nemo-gym of the runtime in the folder `root`, built or not."""
        found = sorted(root.glob("lib/python3.*/site-packages/nemo_gym/__init__.py"))
        return cls(found[0].parent.parent if found else None)


@dataclass(frozen=True)
class Served:
    """An environment with what its configurations define.

    `instances` maps a server instance to its kind; `definitions` to what it is defined by, for comparison.
    """

    config_paths: tuple[str, ...]
    agent: str
    instances: Mapping[str, str]
    definitions: Mapping[str, object]
    asks: frozenset[str] = frozenset()
    """Model servers that it refers to and does not define, besides the policy's: the judge."""
    code: Code = field(default_factory=Code)


def serve(
    name: str, environment: Environment, composed: Composed, judged: bool = False
) -> tuple[Served | None, list[Problem]]:
    """Looks up the environment's configurations and its agent. `judged`: there is a judge for it to ask."""
    models: set[str] = set()
    paths: list[str] = []
    problems: list[Problem] = []
    instances: dict[str, str] = {}
    definitions: dict[str, object] = {}
    servers: set[str] = set()
    own: dict[str, str] = {}
    for index, written in enumerate(environment.config_paths):
        key = ("environments", name, "config_paths", index)
        try:
            config = _config(written, composed.folder_of(key))
        except UserError as error:
            problems.append(Problem(key, str(error)))
            continue
        paths.append(config.path)
        instances |= config.instances
        definitions |= config.definitions
        models |= set(config.models)
        servers |= config.code.servers
        own |= config.code.own
        problems += [Problem(key, sentence) for sentence in config.problems]
    instances |= _instances(environment.config)
    pointed = _references(environment.config)
    # Whoever adds configuration of their own may have pointed those of the files elsewhere.
    sure = pointed if environment.config else models
    if len(paths) == len(environment.config_paths):
        where = ("environments", name, "config" if pointed else "config_paths")
        problems += [Problem(where, sentence) for sentence in _unanswered(sure - set(instances), judged)]
    for instance in environment.config:
        definitions[instance] = (definitions.get(instance), environment.config[instance])
    agents = [instance for instance, kind in instances.items() if kind == "responses_api_agents"]
    agent, no_agent = _agent(name, environment, agents) if len(paths) == len(environment.config_paths) else ("", [])
    if problems:
        return None, [*problems, *no_agent]
    asks = {model for model in models | pointed if re.fullmatch(r"[\w.-]+", model)} - {POLICY} - set(instances)
    code = Code(frozenset(servers), own)
    return Served(tuple(paths), agent, instances, definitions, frozenset(asks), code), no_agent


def clashes(served: Mapping[str, Served]) -> list[Problem]:
    """Environments that define one server instance differently: NeMo Gym would merge them without a word."""
    problems = []
    first: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name, environment in served.items():
        for instance in environment.instances:
            other = first.setdefault(instance, name)
            if other != name and served[other].definitions[instance] != environment.definitions[instance]:
                problems.append(
                    Problem(
                        ("environments", name),
                        f"its server '{instance}' is defined otherwise by the environment '{other}', and NeMo Gym "
                        "knows servers by that name alone: rename it in one of them.",
                    )
                )
        for server, folder in environment.code.own.items():
            if (another := folders.setdefault(server, folder)) != folder:
                problems.append(
                    Problem(
                        ("environments", name),
                        f"the code of its server '{server}' is in {display(Path(folder))}, and another environment has "
                        f"one of that name in {display(Path(another))}: rename one of the folders.",
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


def node_config(
    config: Iterable[Mapping[str, Any]], servers: str, model_name: str, judge: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """What a rollout node adds to the environments' own configurations, as YAML with placeholders.

    It comes last of all configurations, and so wins over them. `servers` is NeMo Gym's `uv_venv_dir`, `judge` what
    `plan.judge` adds.
    """
    import yaml

    settings: dict[str, Any] = dict(judge)
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


@dataclass(frozen=True)
class _Config:
    """One of the `config_paths`: `path` as NeMo Gym is told it."""

    path: str
    instances: Mapping[str, str]
    definitions: Mapping[str, object]
    models: tuple[str, ...] = ()
    code: Code = field(default_factory=Code)
    problems: tuple[str, ...] = ()


def _config(written: str, folder: Path) -> _Config:
    """Raises UserError when it is neither a file nor a configuration that nemo-gym ships."""
    inside = written.removeprefix(INSIDE)
    own = (folder / Path(written).expanduser()).resolve()
    if inside == written and own.is_file():
        tree = _read(own)
        instances = _instances(tree)
        definitions = {instance: tree[instance] for instance in instances}
        code, problems = code_of(tree, own)
        return _Config(str(own), instances, definitions, tuple(sorted(_references(tree))), code, tuple(problems))
    if Path(written).is_absolute() or written.startswith((".", "~")):
        raise UserError(f"there is no file {display(own)}.")
    shipped = gym_configs()
    if inside in shipped:
        found = shipped[inside]
        definitions = dict.fromkeys(found.instances, inside)
        code, problems = Code(frozenset(found.servers)), list(missing(found.missing))
        return _Config(inside, found.instances, definitions, found.models, code, tuple(problems))
    names = [path for path in shipped if not path.startswith("responses_api_models/")]
    close = difflib.get_close_matches(inside, names, n=3, cutoff=0.5) or names[:3]
    raise UserError(
        f"NeMo Gym has no configuration '{inside}', and there is no file {display(own)}; "
        f"nearest in nemo-gym {source('gym')['nemo-gym']}: {', '.join(close)}."
    )


def _unanswered(models: Iterable[str], judged: bool) -> Iterable[str]:
    lost = sorted(model for model in models if model != POLICY and not model.startswith("$"))
    if "???" in lost:
        yield (
            "its configuration leaves open which model server judges ('???'): name it in this environment's config, "
            f"'{JUDGE}' for the section judge."
        )
    elif lost and not judged:
        yield (
            f"it asks the model server {', '.join(repr(model) for model in lost)} (a judge), which nothing defines: "
            "write `judge: {model: FOLDER_OR_NAME}` or `judge: {url: https://HOST/v1, model_name: NAME, api_key_env: "
            "VARIABLE}`, or define that server, or name another, in this environment's config."
        )


def _references(tree: object) -> set[str]:
    """Names of the model servers that a configuration refers to."""
    if isinstance(tree, Mapping):
        found: set[str] = set().union(*map(_references, tree.values()))
        if tree.get("type") == "responses_api_models" and isinstance(tree.get("name"), str):
            found.add(tree["name"])
        return found
    return set().union(*map(_references, tree)) if isinstance(tree, list) else set()


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{display(file)}:{mark.line + 1}" if mark else display(file)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{display(file)}: a configuration of NeMo Gym must hold `key: value` pairs at its top level.")
    return tree


def _agent(name: str, environment: Environment, agents: list[str]) -> tuple[str, list[Problem]]:
    key = ("environments", name, "agent")
    if environment.agent in agents:
        return environment.agent, []
    if environment.agent is not None:
        close = difflib.get_close_matches(environment.agent, agents, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(agents) or 'none'}."
        return "", [Problem(key, f"'{environment.agent}' is no agent of this environment; {hint}")]
    if len(agents) == 1:
        return agents[0], []
    if not agents:
        return "", [Problem(key[:2], "its config_paths define no agent (a server under `responses_api_agents`).")]
    return "", [Problem(key[:2], f"its config_paths define several agents: set agent to one of {', '.join(agents)}.")]


def _instances(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: kind for name, value in settings.items() for kind in KINDS if isinstance(value, Mapping) and kind in value
    }


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(first)
    for key, value in second.items():
        mine = result.get(key)
        result[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result
