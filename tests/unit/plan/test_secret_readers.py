"""Secrets that would stand in an experiment, a Plan or a job script are refused."""

from __future__ import annotations

import pytest
from small_project import Project

from hpc_gym.config.secret_names import is_secret


def test_secrets_are_not_written_where_others_read_them(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted")
    for override in (
        "cluster.env.HF_TOKEN=planted",
        "cluster.role_env.rollout.MY_API_KEY=planted",
        "cluster.setup=['export WANDB_API_KEY=planted']",
        "tracking.wandb.entity='${oc.env:MY_API_KEY}'",
        """tracking.wandb.entity='${oc.env: "MY_API_KEY"}'""",
    ):
        said = project.refused(override, more="tracking: {wandb: {project: x}}\n")
        assert "name it under secrets" in said
        assert "others read it" in said
    project.plan("cluster.env.HF_TOKEN_PATH=/home/me/token", "cluster.setup=['export HF_HOME=/data MY_API_KEY=']")


def test_secrets_are_not_written_into_the_users_own_sections(project: Project) -> None:
    for key, variable in (
        ("environments.mcqa.config.search.api_key", "API_KEY"),
        ("environments.mcqa.config.servers.0.DB_PASSWORD", "DB_PASSWORD"),
        ("vars.hub_token", "HUB_TOKEN"),
        ("vars.listed", "listed"),
    ):
        more = "secrets: [listed]\nenvironments: {mcqa: {config: {servers: [{name: db}]}}}\n"
        said = project.refused(f"{key}=planted", more=more)
        assert f"{key}: would stand in the run directory, where others read it: name it under secrets" in said
        assert f"With secrets: [{variable}], write \\${{oc.env:{variable}}} here" in said
    project.plan(
        "vars.eos_token='</s>'",
        "vars.max_token=5",
        "vars.token=''",
        "vars.api_key=EMPTY",
        "vars.token_file=/home/me/token",
    )


def test_a_secret_that_nemo_gym_reads_on_the_nodes_is_not_read_at_the_submit(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_API_KEY", "planted")
    more = (
        "secrets: [SEARCH_API_KEY]\nenvironments: {mcqa: {config: {search: {api_key: '\\${oc.env:SEARCH_API_KEY}'}}}}\n"
    )
    (gym,) = (each for each in project.plan(more=more).nodes[0].processes if each.name == "gym")
    assert "${oc.env:SEARCH_API_KEY}" in gym.files[0].text
    assert "planted" not in project.plan(more=more).to_json()


def test_secrets_are_known_by_the_end_of_their_names() -> None:
    assert all(map(is_secret, ("HF_TOKEN", "WANDB_API_KEY", "token", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY")))
    assert not any(map(is_secret, ("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "MAX_TOKENS", "KEYBOARD", "SECRETS_DIR")))
    assert not any(map(is_secret, ("eos_token", "PAD_TOKEN", "tool_stop_token")))


def test_ray_wants_a_token_of_the_node_and_vllm_meets_itself_on_loopback(project: Project) -> None:
    processes = {each.name: each for each in project.plan().nodes[0].processes}
    ray = processes["gym"].env
    assert (ray["RAY_AUTH_MODE"], ray["RAY_AUTH_TOKEN_PATH"]) == ("token", "{private_dir}/token")
    vllm = processes["vllm-0"].env
    assert (vllm["GLOO_SOCKET_IFNAME"], vllm["HPC_GYM_INTERFACE"]) == ("lo", "{interface}")
