"""Everything that can be found wrong with an experiment on the login node, before a node is waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_gym.config.problems import Problem, problem_line
from hpc_gym.jobs.findings import Finding
from hpc_gym.jobs.storage_check import size_text, storage_findings, weight_bytes
from hpc_gym.plan.checks import default_hub_cache, refuse_absent_hub_model
from hpc_gym.plan.plan import Plan, Runtime
from hpc_gym.plan.processes import BASE
from hpc_gym.plan.resolve import NotReadyError, resolve
from hpc_gym.runtimes.spec import is_runtime, names


def check_experiment(
    experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None
) -> list[Finding]:
    """All findings, in the order in which a job would come upon them. What is missing hides nothing of the rest.

    Raises UserError, with every problem, when the experiment itself is not well formed.
    """
    problems: list[Finding] = []
    try:
        plan = resolve(experiment, overrides, cluster).plan
    except NotReadyError as error:
        plan = error.outline
        where = error.described.provenance
        lines = [(_check_of(problem), problem_line(problem, where)) for problem in error.problems]
        problems = [Finding(check, "failed", line) for check, line in dict.fromkeys(lines)]
    findings = [Finding("experiment", "ok", _sizes(plan))]
    if any(problem.check == "experiment" for problem in problems):
        findings = []
    findings += problems
    findings += _runtimes(plan)
    failed = {problem.check for problem in problems}
    if "model" not in failed:
        findings.append(_model("model", plan.training.model, plan))
    if "judge" not in failed:
        findings += _judge(plan)
    findings += _data(plan, failed)
    findings += storage_findings(plan)
    if plan.launch.kind == "slurm":
        from hpc_gym.jobs.slurm_check import slurm_findings

        findings += slurm_findings(plan)
    return findings


def _check_of(problem: Problem) -> str:
    """The check that a problem of the experiment belongs to."""
    section, *rest = problem.path or ("",)
    if section == "data":
        return "held-out data" if rest[:1] == ["eval"] else "training data"
    return {"model": "model", "judge": "judge", "runtimes": "runtimes"}.get(str(section), "experiment")


def _sizes(plan: Plan) -> str:
    roles = dict.fromkeys(node.role for node in plan.nodes)
    sizes = ", ".join(f"{sum(node.role == role for node in plan.nodes)} {role}" for role in roles)
    return f"{plan.name}: {sizes} node(s), {plan.training.world_size} training rank(s)"


def _runtimes(plan: Plan) -> Iterator[Finding]:
    for runtime in plan.runtimes.values():
        check = f"runtime {runtime.name}"
        if missing := missing_of(runtime):
            yield Finding(check, "failed", missing)
        else:
            yield Finding(check, "ok", runtime.root)


def missing_of(runtime: Runtime) -> str:
    """What is missing of a runtime, and what to do; "" when nothing is."""
    if runtime.kind in ("apptainer", "pyxis"):
        # Images are also named by a registry's address, which only the compute nodes may reach.
        if not Path(runtime.root).is_absolute() or Path(runtime.root).exists():
            return ""
        return f"there is no image {runtime.root}; one in a registry is written with its scheme, as docker://NAME"
    if runtime.name in names() and not is_runtime(Path(runtime.root)):
        return f"it is not built: hpc-gym runtimes build {runtime.name}"
    return "" if Path(runtime.python).exists() else f"there is no interpreter {runtime.python}"


def missing_runtimes(plan: Plan) -> list[str]:
    """What is missing of the runtimes that a plan names, a sentence each."""
    found = {name: missing_of(runtime) for name, runtime in plan.runtimes.items() if name != BASE}
    return [f"runtime {name}: {missing}" for name, missing in found.items() if missing]


def _model(what: str, model: str, plan: Plan) -> Finding:
    folder = Path(model)
    if folder.is_absolute():
        return Finding(what, "ok", f"{folder}, {size_text(weight_bytes(folder))} of weights")
    key = "judge.model" if what == "judge" else "model.path"
    home = plan.env.get("HF_HOME")
    cache = Path(plan.env.get("HF_HUB_CACHE") or (f"{home}/hub" if home else Path.home() / ".cache/huggingface/hub"))
    shell = default_hub_cache()
    if plan.launch.kind == "local" or _is_cached(model, cache):
        return Finding(what, "ok", f"{model}, in the cache {shell if plan.launch.kind == 'local' else cache}")
    if any("HF_H" in line for line in plan.launch.setup):
        return Finding(what, "warning", f"{model}: the job looks in the cache that cluster.setup names")
    if _is_cached(model, shell):
        # A job starts without the variables of the shell that it is submitted from.
        named = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
        detail = f"{model} is in {shell}, but the job would look in {cache}: set cluster.env.{named} in the profile"
        return Finding(what, "failed", detail)
    detail = (
        f"{model} is not in the cache {cache}, and a job never downloads: fetch it first (`hf download {model}`), "
        f"or set {key} to a folder"
    )
    return Finding(what, "failed", detail)


def _is_cached(model: str, cache: Path) -> bool:
    from hpc_gym.errors import UserError

    try:
        refuse_absent_hub_model(model, cache)
    except UserError:
        return False
    return True


def _judge(plan: Plan) -> Iterator[Finding]:
    judge = plan.rollout.judge
    if judge is None:
        return
    if judge.model is not None:
        yield _model("judge", judge.model, plan)
    elif judge.api_key_env and not os.environ.get(judge.api_key_env):
        yield Finding("judge", "failed", f"{judge.url}: {judge.api_key_env} (judge.api_key_env) is not set here")
    elif judge.url:
        yield _judge_outside(judge.url, judge.model_name, os.environ.get(judge.api_key_env or "", ""))


def _judge_outside(url: str, model: str, key: str) -> Finding:
    from hpc_gym.jobs.judge_check import KeyRefused, NotAnswering, models_at

    try:
        listed = models_at(url, key)
    except NotAnswering as error:
        return Finding("judge", "warning", f"{url} does not answer here ({error}); the nodes must reach it")
    except KeyRefused:
        return Finding("judge", "failed", f"{url} refuses the key: set judge.api_key_env to the variable that holds it")
    if listed is None:
        told = (
            f"{url} answers, but lists no models as an OpenAI-compatible server would: is judge.url its API, up to /v1?"
        )
        return Finding("judge", "warning", told)
    if model not in listed:
        names = ", ".join(listed[:5]) or "none"
        return Finding("judge", "warning", f"{url} does not list '{model}' (judge.model_name); it lists: {names}")
    return Finding("judge", "ok", f"{model} at {url}")


def _data(plan: Plan, failed: set[str]) -> Iterator[Finding]:
    training = plan.training
    for kind, sources in (("training", training.sources), ("held-out", training.evaluation.sources)):
        for source in sources:
            yield Finding(f"{kind} data", "ok", f"{source.environment}: {source.rows} rows, {source.path}")
    if not training.evaluation.sources and "held-out data" not in failed:
        yield Finding("held-out data", "warning", "none: the report will have no evaluation (data.eval)")
