"""A variable of the cluster profile either reaches the processes that it is meant for, or is refused."""

from __future__ import annotations

import pytest
from small_project import Project, make_model

from hpc_gym.plan.owned import DEVICE_VARIABLES, SHARED_VARIABLES, VARIABLES

CPU = "runtimes: {device: cpu}\n"
CUDA = (
    "runtimes: {device: cuda, inference: inference-cpu, train: train-cpu}\ngpus_per_node: 1\n"
    "grpo: {per_device_train_batch_size: 2}\n"
)
EVERY_ROLE = "nodes: {judge: 1, environment: 1}\njudge: {model: judge, placement: nodes, vllm: {max_model_len: 1024}}\n"
# What `node.commands` and `node.engines` set last of all.
ON_THE_NODE = ["PYTHONPATH", "TMPDIR", "NOTIFY_SOCKET", "VIRTUAL_ENV", "HPC_GYM_RUN_DIR", "HPC_GYM_NODE"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_hpc_gym_sets_for_a_process_is_refused_for_all(project: Project, device: str) -> None:
    make_model(project.folder / "judge")
    experiment = project.folder / "small.yaml"
    judged = experiment.read_text().replace("mcqa]", "mcqa, environments/equivalence_llm_judge]")
    experiment.write_text(judged)
    more = EVERY_ROLE + (CPU if device == "cpu" else CUDA)
    plan = project.plan(more=more)
    names = {name for node in plan.nodes for process in node.processes for name in process.env}
    assert {"RANK", "RAY_TMPDIR", "VLLM_HOST_IP", "WANDB_DIR"} <= names
    variables = ", ".join(f"{name}: x" for name in sorted(names | {*ON_THE_NODE}))
    message = project.refused(more=f"{more}cluster: {{env: {{{variables}}}}}\n")
    for name in names | {*ON_THE_NODE}:
        assert f"cluster.env.{name}: hpc-gym owns this variable: " in message


@pytest.mark.parametrize("name", [*ON_THE_NODE, "HPC_GYM_INTERFACE", "WANDB_DIR", "RANK"])
def test_what_not_even_a_role_can_set_is_refused_there_too(project: Project, name: str) -> None:
    message = project.refused(more=f"cluster:\n  role_env:\n    train: {{{name}: x}}\n")
    assert message.startswith(f"top.yaml:4: cluster.role_env.train.{name}: hpc-gym owns this variable: ")


def test_the_refusal_says_what_to_set_instead(project: Project) -> None:
    message = project.refused(more="cluster:\n  env:\n    NCCL_SOCKET_IFNAME: ib0\n")
    assert message == (
        "top.yaml:4: cluster.env.NCCL_SOCKET_IFNAME: hpc-gym owns this variable: set cluster.network_interface, or "
        "cluster.role_env where one role differs."
    )
    assert "set cluster.scratch" in project.refused("cluster.env.TMPDIR=/local")


def test_what_a_role_can_set_reaches_its_processes(project: Project) -> None:
    names = {*SHARED_VARIABLES, *DEVICE_VARIABLES["cpu"]}
    own = ", ".join(f"{name}: mine" for name in sorted(names))
    plan = project.plan(more=f"cluster: {{role_env: {{rollout: {{{own}}}, train: {{{own}}}}}}}\n")
    for process in (each for node in plan.nodes for each in node.processes):
        assert {process.env[name] for name in names} == {"mine"}
    assert not names & set(VARIABLES)


def test_what_hpc_gym_leaves_alone_on_a_device_is_for_all(project: Project) -> None:
    assert project.plan("cluster.env.CUDA_VISIBLE_DEVICES=''").env["CUDA_VISIBLE_DEVICES"] == ""
    plan = project.plan("cluster.env.OMP_NUM_THREADS='8'", more=CUDA)
    assert plan.env["OMP_NUM_THREADS"] == "8"
    assert not any("OMP_NUM_THREADS" in process.env for node in plan.nodes for process in node.processes)
