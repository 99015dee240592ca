"""Servers of NeMo Gym whose code is the user's own: found around their configuration, checked, and linked so that NeMo
Gym finds them too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_project import Project, row

from hpc_gym.plan.plan import Plan, Process

CONFIG = """\
letters: {resources_servers: {letters: {entrypoint: app.py}}}
letters_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: letters}
      model_server: {type: responses_api_models, name: policy_model}
"""
MORE = """\
environments: {letters: {config_paths: [mine/resources_servers/letters/configs/letters.yaml]}}
data: {train: [{environment: letters, path: letters.jsonl}]}
"""


@pytest.fixture
def server(project: Project) -> Path:
    """The folder of a server of one's own, in a project."""
    folder = project.folder / "mine" / "resources_servers" / "letters"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "letters.yaml").write_text(CONFIG)
    (folder / "app.py").touch()
    (folder / "requirements.txt").write_text("-e nemo-gym[dev] @ ../../\nnumpy>=1  # which the runtime has\n")
    (project.folder / "letters.jsonl").write_text(row("letters_agent"))
    return folder


def gym_of(plan: Plan) -> Process:
    return next(process for node in plan.nodes for process in node.processes if process.name == "gym")


def test_nemo_gym_finds_the_code_and_runs_it_in_the_gym_runtime(project: Project, server: Path) -> None:
    plan = project.plan(more=MORE)
    gym, runtime = gym_of(plan), plan.runtimes["gym"].root
    assert gym.argv[:4] == ("env", "-C", "{private_dir}/gym", "gym")
    links = {link.path.removeprefix("{private_dir}/gym/"): link.target for link in gym.links}
    assert links == {
        "resources_servers/letters": str(server),
        "venvs/resources_servers/letters/.venv": runtime,
        # small.yaml's other environments, whose servers nemo-gym has
        "venvs/resources_servers/mcqa/.venv": runtime,
        "venvs/resources_servers/reasoning_gym/.venv": runtime,
        "venvs/responses_api_agents": f"{runtime}/servers/responses_api_agents",
        "venvs/responses_api_models": f"{runtime}/servers/responses_api_models",
    }
    assert yaml.safe_load(gym.files[0].text)["uv_venv_dir"] == "{private_dir}/gym/venvs"


def test_an_agent_of_ones_own_keeps_the_policys_model_server(project: Project, server: Path) -> None:
    agent = server.parents[1] / "responses_api_agents" / "simple_agent"
    agent.mkdir(parents=True)
    (agent / "app.py").touch()
    (agent / "pyproject.toml").write_text('[project]\nname = "mine"\ndependencies = ["nemo-gym", "pydantic"]\n')
    links = {
        link.path.removeprefix("{private_dir}/gym/"): link.target for link in gym_of(project.plan(more=MORE)).links
    }
    assert links["responses_api_agents/simple_agent"] == str(agent)
    assert "venvs/responses_api_agents/simple_agent/.venv" in links


def test_without_code_of_ones_own_nothing_is_linked(project: Project) -> None:
    gym = gym_of(project.plan())
    assert (gym.links, gym.argv[0]) == ((), "gym")


def test_code_that_is_nowhere_is_refused(project: Project, server: Path) -> None:
    (server / "app.py").unlink()
    assert (
        "top.yaml:2: environments.letters.config_paths.0: there is no code for its server 'resources_servers/letters': "
        "nemo-gym 0.4.0 has none of that name, and no folder around "
        "mine/resources_servers/letters/configs/letters.yaml has resources_servers/letters/app.py."
    ) in project.refused(more=MORE)


def test_a_folder_that_nemo_gym_would_not_take_for_a_server_is_refused(project: Project, server: Path) -> None:
    (server / "requirements.txt").unlink()
    message = project.refused(more=MORE)
    assert "mine/resources_servers/letters must have one of requirements.txt and pyproject.toml" in message


def test_requirements_that_the_gym_runtime_lacks_are_named(project: Project, server: Path) -> None:
    (server / "requirements.txt").write_text("numpy\nno-such-package>=2\n")
    message = project.refused(more=MORE)
    assert "its servers need no-such-package>=2, which the gym runtime does not have (locks/gym.txt)" in message


def test_two_servers_of_one_name_in_two_folders_are_refused(project: Project, server: Path) -> None:
    other = project.folder / "other" / "resources_servers" / "letters"
    (other / "configs").mkdir(parents=True)
    for name in ("app.py", "requirements.txt"):
        (other / name).touch()
    environments = "{letters: {config_paths: [mine/resources_servers/letters/configs/letters.yaml]}, "
    environments += "more: {config_paths: [other/resources_servers/letters/configs/more.yaml]}}"
    (other / "configs" / "more.yaml").write_text(
        "more: {resources_servers: {letters: {entrypoint: app.py}}}\n"
        "more_agent: {responses_api_agents: {simple_agent: {entrypoint: app.py}}}\n"
    )
    message = project.refused(more=f"environments: {environments}\n")
    assert "environments.more: the code of its server 'resources_servers/letters' is in other/" in message
    assert "rename one of the folders" in message
