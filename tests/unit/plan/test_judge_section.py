"""The section `judge`: what it adds to a Plan, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from small_project import Project, make_model

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Plan, Process
from hpc_gym.plan.resolve import plan_for, resolve

JUDGED = "extends: [./small.yaml, environments/equivalence_llm_judge]\n"
SERVED = "judge: {model: judge, vllm: {max_model_len: 1024}}\n"
OUTSIDE = "judge: {url: https://judge.example/v1/, model_name: big, api_key_env: JUDGE_KEY}\n"
CUDA = "runtimes: {device: cuda, inference: inference-cpu, train: train-cpu}\n"


@pytest.fixture
def judged(project: Project) -> Project:
    make_model(project.folder / "judge")
    return project


def plan_of(project: Project, more: str, *overrides: str) -> Plan:
    (project.folder / "judged.yaml").write_text(JUDGED + more)
    return plan_for("judged.yaml", overrides)


def refused(project: Project, more: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(project, more, *overrides)
    return str(caught.value)


def process(plan: Plan, name: str) -> Process:
    return next(each for each in plan.nodes[0].processes if each.name == name)


def gym_settings(plan: Plan) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(process(plan, "gym").files[0].text)
    return loaded


def test_each_rollout_node_serves_a_frozen_judge_that_only_its_socket_reaches(judged: Project) -> None:
    plan = plan_of(judged, SERVED, "nodes.rollout=2")
    assert [[each.role for each in node.processes].count("judge") for node in plan.nodes] == [1, 1, 0, 0]
    judge = process(plan, "judge")
    command = " ".join(judge.argv)
    assert command.startswith(f"vllm serve {judged.folder / 'judge'} --uds {{private_dir}}/judge.sock")
    assert "--served-model-name judge" in command
    assert "--max-model-len 1024" in command
    assert not any(word in command for word in ("weight-transfer", "worker-extension", "--port", "--api-key"))
    assert "VLLM_SERVER_DEV_MODE" not in judge.env
    assert judge.ready is not None
    assert (judge.ready.kind, judge.ready.target) == ("http", "judge.sock")
    assert plan.rollout.judge is not None
    assert plan.rollout.judge.url is None


def test_nemo_gym_asks_the_rollout_server_for_it(judged: Project) -> None:
    settings = gym_settings(plan_of(judged, SERVED))
    server = settings["judge_model"]["responses_api_models"]["vllm_model"]
    assert server["base_url"] == settings["judge_base_url"] == "http://127.0.0.1:{port:policy}/judge/v1"
    assert server["model"] == "judge"
    assert server["return_token_id_information"] is False


def test_a_server_of_another_name_is_the_judge_too(judged: Project) -> None:
    more = "environments: {mine: {config_paths: [environments/abstention/config.yaml]}}\n"
    settings = gym_settings(judged.plan(more=SERVED + more))
    assert "vllm_model" in settings["genrm_model"]["responses_api_models"]
    assert "judge_model" not in settings


def test_a_judge_outside_gets_its_key_from_the_secrets(judged: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-planted")
    plan = plan_of(judged, OUTSIDE)
    judge = plan.rollout.judge
    assert judge is not None
    assert (judge.url, judge.model_name, judge.api_key_env) == ("https://judge.example/v1", "big", "JUDGE_KEY")
    assert "JUDGE_KEY" in plan.secrets
    assert "judge" not in [each.name for each in plan.nodes[0].processes]
    settings = gym_settings(plan)
    assert settings["judge_model"]["responses_api_models"]["vllm_model"]["model"] == "big"
    assert "judge.example" not in json.dumps(settings)
    assert "sk-planted" not in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan


def test_the_resolved_experiment_names_the_same_judge_from_anywhere(judged: Project) -> None:
    (judged.folder / "judged.yaml").write_text(JUDGED + SERVED)
    resolved = resolve("judged.yaml")
    elsewhere = judged.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "again.yaml").write_text(resolved.experiment_yaml())
    assert plan_for(elsewhere / "again.yaml") == resolved.plan


def test_the_judge_takes_the_last_gpus_and_the_policy_the_others(judged: Project) -> None:
    wanted = ["gpus_per_node=8", "judge.vllm.tensor_parallel_size=2", "vllm.tensor_parallel_size=2"]
    plan = plan_of(judged, SERVED + CUDA, *wanted)
    gpus = {
        each.name: each.env["CUDA_VISIBLE_DEVICES"]
        for each in plan.nodes[0].processes
        if "CUDA_VISIBLE_DEVICES" in each.env
    }
    assert gpus == {"judge": "6,7", "vllm-0": "0,1", "vllm-1": "2,3", "vllm-2": "4,5"}
    assert plan.rollout.replicas == 3


def test_gpus_that_do_not_suffice_are_counted_out(judged: Project) -> None:
    message = refused(judged, SERVED + CUDA, "gpus_per_node=4", "judge.vllm.tensor_parallel_size=4")
    assert "judge.vllm: the judge takes 4 of the 4 GPUs of a rollout node (gpus_per_node), and vLLM for the" in message
    assert "that is 5" in message


def test_without_a_judge_the_environment_is_refused_with_what_to_write(judged: Project) -> None:
    message = refused(judged, "")
    assert "environments.equivalence_llm_judge.config: it asks the model server 'judge_model' (a judge)" in message
    assert "write `judge: {model: FOLDER_OR_NAME}`" in message


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("{}", "judge: set exactly one of model"),
        ("{model: judge, url: https://a.example/v1, model_name: big}", "judge: set exactly one of model"),
        ("{model: nowhere}", "judge.model: there is no folder"),
        ("{model: judge, model_name: big}", "judge.model_name: belongs to judge.url"),
        ("{model: judge, api_key_env: KEY}", "judge.api_key_env: belongs to judge.url"),
        (
            "{model: judge, placement: nodes}",
            "judge.placement: nodes gives the judge nodes of its own, but nodes.judge",
        ),
        ("{url: https://a.example/v1, model_name: big, placement: nodes}", "judge.placement: belongs to judge.model"),
        ("{model: judge, placement: node}", "judge.placement: 'node' is not allowed; allowed: 'rollout' or 'nodes'"),
        ("{model: judge, vllm: {port: 1}}", "judge.vllm.port: hpc-gym owns this option: the judge's vLLM listens on"),
        ("{model: judge, vllm: {max_modl_len: 1}}", "judge.vllm.max_modl_len: `vllm serve` has no such option; did"),
        ("{model: judge, modle: x}", "judge.modle: unknown key; did you mean 'model'?"),
        ("{url: https://a.example/v1}", "judge: model_name is missing"),
        ("{url: a.example, model_name: big}", "judge.url: must be an address like https://HOST/v1"),
        ("{url: https://me:pw@a.example/v1, model_name: big}", "judge.url: must hold no user or password"),
        ("{url: https://a.example/v1, model_name: big, vllm: {seed: 1}}", "judge.vllm"),
        ("{url: https://a.example/v1, model_name: big, api_key_env: sk-1}", "judge.api_key_env: must be the name of"),
    ],
)
def test_a_section_that_cannot_be_is_refused(judged: Project, section: str, says: str) -> None:
    assert says in refused(judged, f"judge: {section}\n")


def test_a_judge_that_nobody_asks_is_refused(judged: Project) -> None:
    assert "judge: no environment asks it" in judged.refused(more=SERVED)
    (judged.folder / "off.yaml").write_text("extends: [./small.yaml, environments/math_with_judge]\n" + SERVED)
    with pytest.raises(UserError, match="judge: no environment asks it"):
        plan_for("off.yaml")


def test_an_environment_that_leaves_its_judge_open_must_name_it(judged: Project) -> None:
    path = "resources_servers/math_with_judge/configs/dapo17k.yaml"
    message = judged.refused(more=SERVED + f"environments: {{mine: {{config_paths: [{path}]}}}}\n")
    assert "its configuration leaves open which model server judges ('???')" in message


def test_a_file_of_ones_own_is_looked_through_for_the_judge(judged: Project) -> None:
    (judged.folder / "own.yaml").write_text(
        "own: {resources_servers: {mcqa: {judge: {type: responses_api_models, name: my_judge}}}}\n"
        "own_agent: {responses_api_agents: {simple_agent: {entrypoint: app.py}}}\n"
    )
    more = "environments: {mine: {config_paths: [./own.yaml]}}\n"
    assert "it asks the model server 'my_judge' (a judge)" in judged.refused(more=more)
    assert "my_judge" in gym_settings(judged.plan(more=SERVED + more))
