"""The judge: a frozen model that verifies. Its vLLM, or the address outside, is known to the rollout servers and the
environment servers alone; NeMo Gym asks the one of its node on loopback, for what NeMo Gym knows stands on command
lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal
from urllib.parse import urlsplit

from hpc_gym.config.problems import Problem
from hpc_gym.config.schema import Experiment
from hpc_gym.config.schema import Judge as Section
from hpc_gym.plan.plan import Judge, Probe, Process
from hpc_gym.plan.processes import BASE, Names, gpus_of_judge, role_env, vllm_env, vllm_flags, with_defaults
from hpc_gym.plan.spread import gpus_of

SERVED_NAME = "judge"
"""What the judge's vLLM calls its model."""
SOCKET = "judge.sock"
_BASE_URL = "http://127.0.0.1:{port:policy}/judge/v1"
_ONLY_OUTSIDE = ("model_name", "api_key_env")


def judge_problems(experiment: Experiment) -> Iterable[Problem]:
    """What is wrong with the section `judge` and `nodes.judge`."""
    judge, nodes = experiment.judge, experiment.nodes.judge
    apart = judge is not None and judge.placement == "nodes"
    if nodes and not apart:
        what = "there is no section judge" if judge is None else "judge.placement is rollout"
        yield Problem(
            ("nodes", "judge"),
            f"{nodes} nodes for the judge, but {what}: set judge.model and judge.placement to nodes, or this to 0.",
        )
    if judge is None:
        return
    if apart and judge.url is not None:
        yield Problem(("judge", "placement"), "belongs to judge.model; judge.url runs elsewhere: take one away.")
    elif apart and not nodes:
        yield Problem(
            ("judge", "placement"), "nodes gives the judge nodes of its own, but nodes.judge is 0: say how many."
        )
    elif apart and experiment.runtimes.device == "cuda" and gpus_of(judge.vllm) > experiment.gpus_per_node:
        yield Problem(
            ("judge", "vllm"),
            f"the judge takes {gpus_of(judge.vllm)} GPUs, but a node has {experiment.gpus_per_node} (gpus_per_node).",
        )
    if (judge.model is None) == (judge.url is None):
        yield Problem(
            ("judge",),
            "set exactly one of model (a frozen model that the job serves) and url (an OpenAI-compatible address).",
        )
    elif judge.model is not None:
        for name in _ONLY_OUTSIDE:
            if getattr(judge, name) is not None:
                yield Problem(("judge", name), "belongs to judge.url; a judge.model needs none: take it away.")
    else:
        yield from _outside_problems(judge)


def _outside_problems(judge: Section) -> Iterable[Problem]:
    if judge.vllm:
        yield Problem(("judge", "vllm"), "belongs to judge.model; whoever runs judge.url set it up: take it away.")
    if judge.model_name is None:
        yield Problem(("judge",), "model_name is missing: say what the model is called at judge.url.")
    parts = urlsplit(judge.url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        # Not quoted: whoever wrote a key into it does not want to read it in a log.
        yield Problem(("judge", "url"), "must be an address like https://HOST/v1, without a query.")
    elif parts.username or parts.password:
        yield Problem(("judge", "url"), "must hold no user or password: name the variable of the key in api_key_env.")
    if judge.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", judge.api_key_env):
        yield Problem(("judge", "api_key_env"), "must be the name of an environment variable, not the key itself.")


def judge_settings(experiment: Experiment, model: str | None) -> Judge | None:
    """What a job needs to know of the judge; `model`: what its vLLM serves, None for an address outside."""
    judge = experiment.judge
    if judge is None:
        return None
    # An answer that takes longer than any rollout may is of no use to one.
    timeout_s = max(environment.timeout_s for environment in experiment.environments.values())
    url = judge.url.rstrip("/") if judge.url else None
    return Judge(judge.model_name or SERVED_NAME, timeout_s, url, judge.api_key_env, model)


def secret_names(experiment: Experiment) -> tuple[str, ...]:
    """Names of the environment variables that travel as secrets, with that of the judge's key."""
    key = experiment.judge.api_key_env if experiment.judge else None
    return tuple(dict.fromkeys([*experiment.secrets, *([key] if key else [])]))


def judge_servers(judge: Section | None, instances: Iterable[str], api_key: str) -> dict[str, Any]:
    """NeMo Gym configuration: a model server for the judge under each of the names that environments refer to, and
    the variables that NeMo Gym's own judge configurations read.
    """
    if judge is None:
        return {}
    model_name = judge.model_name or SERVED_NAME
    server = {
        "entrypoint": "app.py",
        "base_url": _BASE_URL,
        "api_key": api_key,
        "model": model_name,
        "return_token_id_information": False,
        "uses_reasoning_parser": True,
    }
    return {
        "judge_base_url": _BASE_URL,
        "judge_api_key": api_key,
        "judge_model_name": model_name,
        **{name: {"responses_api_models": {"vllm_model": dict(server)}} for name in sorted(instances)},
    }


def judge_endpoints(experiment: Experiment, role: Literal["rollout", "environment"]) -> str | None:
    """Where the server of such a node finds the judge, as a placeholder; None where it is on that node, or outside."""
    judge = experiment.judge
    if judge is None or judge.model is None:
        return None
    if judge.placement == "nodes":
        return "{endpoints:judge}"
    return "{endpoints:rollout}" if role == "environment" else None


def judge_processes(experiment: Experiment, names: Names, model: str | None) -> tuple[Process, ...]:
    """The judge on a rollout node, which has the last GPUs; nothing where it is elsewhere."""
    if experiment.judge is None or model is None or experiment.judge.placement == "nodes":
        return ()
    last = experiment.gpus_per_node
    return (_vllm(experiment, experiment.judge, names, model, range(last - gpus_of_judge(experiment), last)),)


def judge_node_processes(
    experiment: Experiment, names: Names, index: int, model: str | None
) -> tuple[Process, Process]:
    """The judge on judge node `index`, and the server before it."""
    assert experiment.judge is not None and model is not None, "judge_problems refuses nodes without a judge"
    endpoint = f"judge-{index}"
    argv = (
        *("{python}", "-m", "hpc_gym.rollout.judge_server", "--run-dir", "{run_dir}", "--node", "{node}"),
        *("--fd", f"{{fd:{endpoint}}}", "--private-dir", "{private_dir}", "--secrets", "{secrets}"),
    )
    server = Process(
        name="judge-server",
        role="judge",
        kind="service",
        runtime=BASE,
        argv=argv,
        env=role_env(experiment, "judge", {}),
        listen=(endpoint,),
        ready=Probe(kind="notify"),
        ready_within_s=experiment.supervision.vllm_ready_s,
        alive_within_s=experiment.supervision.alive_s,
        restarts=experiment.supervision.restarts,
    )
    gpus = range(gpus_of(experiment.judge.vllm))
    return (_vllm(experiment, experiment.judge, names, model, gpus), server)


def _vllm(experiment: Experiment, judge: Section, names: Names, model: str, gpus: range) -> Process:
    """The judge's vLLM: without dev mode, on a socket that only we can reach."""
    options = {"seed": experiment.seed, "disable_uvicorn_access_log": True, **judge.vllm}
    argv = (
        *("vllm", "serve", model, "--uds", f"{{private_dir}}/{SOCKET}", "--served-model-name", SERVED_NAME),
        *("--middleware", "hpc_gym.rollout.engine_health.EngineHealth"),
        *vllm_flags(with_defaults(experiment, options)),
    )
    return Process(
        name="judge",
        role="judge",
        kind="service",
        runtime=names.inference,
        argv=argv,
        env=role_env(experiment, "judge", vllm_env(experiment, gpus)),
        # Its dev mode, in which the policy's vLLM asks the engine by itself, opens more than a judge needs.
        ready=Probe(kind="http", target=SOCKET, path="/engine_health"),
        ready_within_s=experiment.supervision.vllm_ready_s,
        alive_within_s=experiment.supervision.alive_s,
        restarts=experiment.supervision.restarts,
    )
