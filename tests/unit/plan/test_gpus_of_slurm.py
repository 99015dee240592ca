"""Every node whose programs take GPUs asks Slurm for them, and for enough."""

from __future__ import annotations

import pytest
from small_project import Project, make_model

from hpc_gym.jobs.slurm_script import sbatch_options

_GPU_OPTIONS = ("gpus-per-node", "gres", "tres-per-task")
ROLES = ("rollout", "judge", "environment", "train")


@pytest.fixture
def every_role(project: Project) -> Project:
    """All four roles on nodes of their own with 8 GPUs each, the judge on 4 of them."""
    make_model(project.folder / "judge")
    path = project.folder / "small.yaml"
    judge = "judge: {model: judge, placement: nodes, vllm: {max_model_len: 1024, tensor_parallel_size: 4}}\n"
    device = "runtimes: {device: cuda, inference: inference-cpu, train: train-cpu}\ngpus_per_node: 8\n"
    text = path.read_text().replace("environments/mcqa]", "environments/mcqa, environments/equivalence_llm_judge]")
    text = text.replace("{rollout: 1, train: 2}", "{rollout: 1, judge: 1, environment: 1, train: 2}")
    path.write_text(text.replace("device_train_batch_size: 6", "device_train_batch_size: 1") + judge + device)
    return project


def asked(project: Project, options: str) -> dict[str, list[str]]:
    """What the nodes of each role ask for, of the options that may mean GPUs."""
    plan = project.plan(more=f"cluster: {{kind: slurm, slurm: {options}}}\n")
    found = sbatch_options(plan)
    return {
        node.role: [f"{name}={found[node.component][name]}" for name in _GPU_OPTIONS if name in found[node.component]]
        for node in plan.nodes
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{}", (["gpus-per-node=8"], ["gpus-per-node=8"], [], ["gpus-per-node=8"])),
        # It asks for something else than GPUs.
        (
            "{gres: 'lscratch:200'}",
            (
                ["gpus-per-node=8", "gres=lscratch:200"],
                ["gpus-per-node=8", "gres=lscratch:200"],
                ["gres=lscratch:200"],
                ["gpus-per-node=8", "gres=lscratch:200"],
            ),
        ),
        # One role counts in a way of its own.
        ("{judge: {gres: 'gpu:h100:4'}}", (["gpus-per-node=8"], ["gres=gpu:h100:4"], [], ["gpus-per-node=8"])),
        (
            "{gres: 'gpu:8', train: {gres: 'lscratch:200'}}",
            (["gres=gpu:8"], ["gres=gpu:8"], [], ["gpus-per-node=8", "gres=lscratch:200"]),
        ),
        (
            "{tres-per-task: 'gres/gpu:8', environment: {gres: 'gpu:1'}}",
            (["tres-per-task=gres/gpu:8"], ["tres-per-task=gres/gpu:8"], ["gres=gpu:1"], ["tres-per-task=gres/gpu:8"]),
        ),
        # Nodes that bring their GPUs along, at a site that does not count them.
        ("{gpus-per-node: null}", ([], [], [], [])),
        ("{train: {gpus_per_node: null}}", (["gpus-per-node=8"], ["gpus-per-node=8"], [], [])),
    ],
)
def test_nodes_whose_options_name_no_gpus_ask_for_those_of_the_experiment(
    every_role: Project, options: str, expected: tuple[list[str], ...]
) -> None:
    assert asked(every_role, options) == dict(zip(ROLES, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            "{gres: 'gpu:a100:4'}",
            "cluster.slurm.gres: 'gpu:a100:4' gives a train node 4 GPUs, and its programs take 8 (ranks_per_node; "
            "gpus_per_node = 8): ask for 8 here, or set gpus_per_node, and what follows from it, to what train nodes "
            "get.",
        ),
        (
            "{gres: 'gpu:a100:4'}",
            "cluster.slurm.gres: 'gpu:a100:4' gives a rollout node 4 GPUs, and its programs take 8 (rollouts.replicas, "
            "vllm; gpus_per_node = 8): ask for 8 here",
        ),
        (
            "{judge: {gpus-per-node: 2}}",
            "cluster.slurm.judge.gpus-per-node: 2 gives a judge node 2 GPUs, and its programs take 4 (judge.vllm;",
        ),
    ],
)
def test_fewer_gpus_than_the_programs_of_a_node_take_are_refused(every_role: Project, options: str, says: str) -> None:
    message = every_role.refused(more=f"cluster: {{kind: slurm, slurm: {options}}}\n")
    assert says in message
    assert "(gpus_per_node: small.yaml:" in message


def test_what_takes_less_may_ask_for_less(every_role: Project) -> None:
    options = "{rollout: {gres: 'gpu:2'}, judge: {gres: 'gpu:4'}, train: {gres: 'gpu:6'}}"
    slurm = f"cluster: {{kind: slurm, slurm: {options}}}\n"
    assert every_role.plan("rollouts.replicas=2", "ranks_per_node=6", "grpo.per_device_train_batch_size=2", more=slurm)
