"""What the Plan tells vLLM and NeMo Gym, read by their own parsers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_project import Project, row

from hpc_gym.plan.plan import Plan, Process
from hpc_gym.runtimes.spec import RuntimeSpec, is_built, spec_of
from hpc_gym.shipped import shipped

pytestmark = pytest.mark.e2e

PARSE_VLLM = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = []
for argv in json.load(sys.stdin):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    validate_parsed_serve_args(parsed)
    found.append({name: value for name, value in vars(parsed).items()})
print("PARSED" + json.dumps(found, default=str))
"""


def built(name: str) -> RuntimeSpec:
    runtime = spec_of(name)
    if not is_built(runtime):
        pytest.skip(f"the runtime {name} is not built: hpc-gym runtimes build")
    return runtime


def process(plan: Plan, name: str) -> Process:
    return next(each for node in plan.nodes for each in node.processes if each.name == name)


def parsed_by_vllm(*processes: Process) -> list[dict[str, Any]]:
    """What vLLM's own parser makes of the commands of processes."""
    done = subprocess.run(
        [str(built("inference-cpu").python), "-c", PARSE_VLLM],
        # The endpoint at which the parts of a vLLM meet is known when a job runs.
        input=json.dumps([[re.sub(r"\{portof:[^}]*\}", "23456", each) for each in one.argv[2:]] for one in processes]),
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "VLLM_NO_USAGE_STATS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.rpartition("PARSED")[2])
    return found


def test_vllm_understands_every_flag(project: Project) -> None:
    more = (
        "vllm:\n  enable_prefix_caching: false\n  limit_mm_per_prompt: {image: 5}\n"
        "  max_num_seqs: 8\n  gpu_memory_utilization: 0.5\n  disable_log_stats: true\n"
    )
    spread = ["vllm.nnodes=2", "vllm.tensor_parallel_size=2", "vllm.pipeline_parallel_size=2", "nodes.rollout=2"]
    plan = project.plan(*spread)
    parsed, *parts = parsed_by_vllm(
        process(project.plan(more=more), "vllm-0"), process(plan, "vllm-0"), process(plan, "vllm-headless")
    )
    assert [(part["nnodes"], part["node_rank"], part["headless"]) for part in parts] == [(2, 0, False), (2, 1, True)]
    assert parsed["model_tag"] == str(project.folder / "model")
    assert parsed["uds"] == "{private_dir}/vllm-0.sock"
    assert parsed["max_model_len"] == 2048
    assert parsed["enable_prefix_caching"] is False
    assert parsed["enable_auto_tool_choice"] is True
    assert parsed["limit_mm_per_prompt"] == {"image": 5}
    assert parsed["kv_cache_memory_bytes"] == 1 << 30


def test_nemo_gym_resolves_every_shipped_environment_as_the_node_gets_it(project: Project, tmp_path: Path) -> None:
    runtime = built("gym")
    names = sorted(file.stem for file in (shipped("configs") / "environments").glob("*.yaml"))
    (tmp_path / "rows.jsonl").write_text(row())
    more = f"extends: [./small.yaml, {', '.join(f'environments/{name}' for name in names)}]\n"
    (tmp_path / "all.yaml").write_text(more + "data: {train: [{environment: mcqa, path: rows.jsonl}]}\n")
    judge = "environments.equivalence_llm_judge.config.equivalence_llm_judge.resources_servers.equivalence_llm_judge"
    from hpc_gym.plan.resolve import plan_for

    asked = ["judge={url: http://127.0.0.1:9/v1, model_name: judge}", f"{judge}.judge_model_server.name=judge_model"]
    plan = plan_for("all.yaml", asked)
    gym = process(plan, "gym")
    (file,) = gym.files
    config = tmp_path / "node.yaml"
    text = (
        file.text.replace("{port:gym-head}", "23456").replace("{port:gym}", "23500").replace("{port:gym+99}", "23599")
    )
    config.write_text(text.replace("{port:policy}", "23457"))
    paths = gym.argv[3].replace(file.path, str(config))
    done = subprocess.run(
        [str(runtime.root / "bin/gym"), "env", "resolve", paths, f"hydra.run.dir={tmp_path}/hydra", *gym.argv[5:]],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resolved = yaml.safe_load(done.stdout[done.stdout.index("policy_model:") :])
    for environment in plan.environments:
        assert "responses_api_agents" in resolved[environment.agent], environment.name
    assert resolved["policy_base_url"] == "http://127.0.0.1:23457/v1"
    assert resolved["head_server"] == {"host": "127.0.0.1", "port": 23456}
    assert not (tmp_path / "outputs").exists()  # Hydra's folder went where it was told


START = """
import json, sys
from pathlib import Path
from nemo_gym.cli.env import _resolve_server_dir
from nemo_gym.cli.setup_command import setup_env_command
settings = {"uv_venv_dir": sys.argv[1], "skip_venv_if_present": True, "head_server_deps": [], "python_version": "3.12"}
print("COMMANDS" + json.dumps([
    setup_env_command(_resolve_server_dir(Path(each)), settings, "x") for each in sys.argv[2:]
]))
"""


def test_nemo_gym_starts_a_server_of_ones_own_in_the_gym_runtime(project: Project, tmp_path: Path) -> None:
    """By NeMo Gym's own functions, with the links of the Plan: its code where it is, every server in one venv."""
    runtime = built("gym")
    code = project.folder / "mine/resources_servers/letters"
    code.mkdir(parents=True)
    for name in ("app.py", "requirements.txt"):
        (code / name).touch()
    (project.folder / "mine/letters.yaml").write_text(
        "letters: {resources_servers: {letters: {entrypoint: app.py}}}\n"
        "letters_agent: {responses_api_agents: {simple_agent: {entrypoint: app.py}}}\n"
    )
    gym = process(project.plan(more="environments: {letters: {config_paths: [mine/letters.yaml]}}\n"), "gym")
    private = tmp_path / "private"
    for link in gym.links:
        path = Path(link.path.replace("{private_dir}", str(private)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(link.target)
    venvs = str(yaml.safe_load(gym.files[0].text)["uv_venv_dir"]).replace("{private_dir}", str(private))
    servers = ["resources_servers/letters", "resources_servers/mcqa", "responses_api_agents/simple_agent"]
    done = subprocess.run(
        [str(runtime.python), "-c", START, venvs, *servers, "responses_api_models/vllm_model"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=private / "gym",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    own, *others = json.loads(done.stdout.rpartition("COMMANDS")[2])
    assert own.startswith(f"cd {private}/gym/resources_servers/letters && source {venvs}/resources_servers/letters/")
    for command in (own, *others):
        assert command.endswith("/.venv/bin/activate"), command  # or it would install what the server requires
        assert Path(command.rpartition("source ")[2]).resolve() == (runtime.root / "bin/activate").resolve()
