"""One vLLM over several rollout nodes, and several on one: which node runs what, on which GPUs, and what is refused."""

from __future__ import annotations

import pytest
from small_project import Project

from hpc_gym.node.placeholders import declared_endpoints, wanted_endpoints
from hpc_gym.plan.plan import Process

CUDA = "gpus_per_node: 8\nruntimes: {device: cuda, inference: inference-cpu, train: train-cpu}\n"
SPREAD = ["vllm.nnodes=2", "nodes.rollout=4", "grpo.per_device_train_batch_size=1"]


def flags(process: Process) -> dict[str, str]:
    """`--name value` of a command."""
    return {name: value for name, value in zip(process.argv, process.argv[1:], strict=False) if name.startswith("--")}


def test_the_first_node_of_a_group_has_all_servers_and_the_others_a_share_of_vllm(project: Project) -> None:
    plan = project.plan("vllm.tensor_parallel_size=16", *SPREAD, more=CUDA)
    rollout = [node for node in plan.nodes if node.role == "rollout"]
    assert [[process.name for process in node.processes] for node in rollout] == [
        ["vllm-0", "gym", "rollout-server"],
        ["vllm-headless"],
    ] * 2
    assert plan.rollout.replicas == 1
    for group, (first, second) in enumerate(((rollout[0], rollout[1]), (rollout[2], rollout[3]))):
        head, part, server = first.processes[0], second.processes[0], first.processes[2]
        meeting = {"--master-addr": f"{{host:vllm-master-{group}}}", "--master-port": f"{{portof:vllm-master-{group}}}"}
        for rank, process in enumerate((head, part)):
            assert flags(process).items() >= {**meeting, "--nnodes": "2", "--node-rank": str(rank)}.items()
            assert process.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
            assert process.env["VLLM_HOST_IP"] == "{address}"
            assert process.env["GLOO_SOCKET_IFNAME"] == process.env["NCCL_SOCKET_IFNAME"] == "{interface}"
            assert process.together == f"vllm-{group}"
        assert (head.ports, part.ports) == ((f"vllm-master-{group}",), ())
        assert ("--uds" in head.argv, "--uds" in part.argv) == (True, False)
        assert ("--headless" in head.argv, "--headless" in part.argv) == (False, True)
        assert (head.ready is None, part.ready is None) == (False, True)
        # Trainers find rollout servers by number, without gaps.
        assert server.listen == (f"rollout-{group}",)
    declared = declared_endpoints(plan)
    for node in plan.nodes:
        for process in node.processes:
            wanted_endpoints(process, declared)


def test_parts_agree_on_all_but_their_place(project: Project) -> None:
    plan = project.plan("vllm.tensor_parallel_size=8", "vllm.pipeline_parallel_size=2", *SPREAD, more=CUDA)
    head, part = plan.nodes[0].processes[0], plan.nodes[1].processes[0]
    assert set(part.argv) - set(head.argv) == {"--headless", "1"}
    assert head.env == part.env


def test_a_vllm_of_one_node_stays_on_loopback(project: Project) -> None:
    for overrides in ([], ["vllm.nnodes=1"], ["nodes.rollout=2"]):
        process = project.plan(*overrides).nodes[0].processes[0]
        assert process.env["VLLM_HOST_IP"] == "127.0.0.1"
        assert process.ports == ()
        assert process.together == ""
        assert "--master-addr" not in process.argv


@pytest.mark.parametrize(
    ("sizes", "gpus"),
    [
        (["vllm.tensor_parallel_size=2", "vllm.pipeline_parallel_size=2"], ["0,1,2,3", "4,5,6,7"]),
        (["vllm.prefill_context_parallel_size=4"], ["0,1,2,3", "4,5,6,7"]),
        (["vllm.data_parallel_size=4"], ["0,1,2,3", "4,5,6,7"]),
        (["vllm.tensor_parallel_size=3"], ["0,1,2", "3,4,5"]),
        (["vllm.tensor_parallel_size=2", "rollouts.replicas=1"], ["0,1"]),
    ],
)
def test_each_vllm_of_a_node_has_the_gpus_of_all_its_workers(
    project: Project, sizes: list[str], gpus: list[str]
) -> None:
    processes = project.plan(*sizes, "grpo.per_device_train_batch_size=1", more=CUDA).nodes[0].processes
    found = [each.env["CUDA_VISIBLE_DEVICES"] for each in processes if each.name.startswith("vllm")]
    assert found == gpus


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["vllm.nnodes=0"], "vllm.nnodes: must be a whole number of at least 1, not 0."),
        (
            ["vllm.nnodes=2", "vllm.tensor_parallel_size=16", "nodes.rollout=3"],
            "nodes.rollout: 3 must be a multiple of vllm.nnodes = 2, the nodes of one vLLM; nearest: 2 or 4.",
        ),
        (
            ["vllm.nnodes=2", "vllm.tensor_parallel_size=3", "nodes.rollout=2"],
            "vllm.nnodes: 2 must divide tensor_parallel_size x pipeline_parallel_size = 3",
        ),
        (
            ["vllm.nnodes=2", "vllm.data_parallel_size=2", "nodes.rollout=2"],
            "vllm.data_parallel_size: does not go with vllm.nnodes = 2",
        ),
        (
            ["vllm.nnodes=2", "vllm.tensor_parallel_size=2", "nodes.rollout=2", "rollouts.replicas=2"],
            "rollouts.replicas: 2 vLLM servers per rollout node, but vllm.nnodes = 2 makes one of 2 nodes",
        ),
        (
            [
                *("vllm.nnodes=2", "vllm.tensor_parallel_size=2", "nodes.rollout=2"),
                "vllm.distributed_executor_backend=ray",
            ],
            "vllm.distributed_executor_backend: 'ray' does not start the workers",
        ),
        (
            ["vllm.nnodes=2", "vllm.tensor_parallel_size=32", "nodes.rollout=2"],
            "vllm.tensor_parallel_size: tensor_parallel_size x pipeline_parallel_size x data_parallel_size / nnodes 2 "
            "= 16 GPUs per vLLM, times 1 on a rollout node, is 16; a node has 8 (gpus_per_node).",
        ),
        (["vllm.node_rank=1"], "vllm.node_rank: hpc-gym owns this option: hpc-gym starts every part of a vLLM"),
        (["vllm.data_parallel_rank=1"], "vllm.data_parallel_rank: hpc-gym owns this option"),
        (
            ["judge.model=model", "judge.vllm.nnodes=2"],
            "judge.vllm.nnodes: hpc-gym owns this option: a judge's vLLM runs on one node",
        ),
    ],
)
def test_refused(project: Project, overrides: list[str], says: str) -> None:
    assert says in project.refused(*overrides, "grpo.per_device_train_batch_size=1", more=CUDA)
