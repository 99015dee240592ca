"""Nodes of their own for NeMo Gym and for the judge: what runs where, what finds what, and how Slurm is asked."""

from __future__ import annotations

import re

import pytest
import yaml
from small_project import Project, make_model

from hpc_gym.errors import UserError
from hpc_gym.jobs.slurm_script import Directives, sbatch_options, srun_options
from hpc_gym.node.placeholders import declared_endpoints, wanted_endpoints
from hpc_gym.plan.plan import Plan, Process
from hpc_gym.plan.resolve import plan_for

CUDA = "runtimes: {device: cuda, inference: inference-cpu, train: train-cpu}\ngpus_per_node: 8\n"
SLURM = "cluster: {kind: slurm, slurm: {partition: gpu, exclusive: true}}\n"
JUDGE = "judge: {model: judge, vllm: {max_model_len: 1024}"
ON_NODES = JUDGE + ", placement: nodes}\n"
FEW = "grpo.per_device_train_batch_size=1"


@pytest.fixture
def judged(project: Project) -> Project:
    make_model(project.folder / "judge")
    path = project.folder / "small.yaml"
    text = path.read_text()
    path.write_text(text.replace("environments/mcqa]", "environments/mcqa, environments/equivalence_llm_judge]"))
    return project


def names(plan: Plan, node: str) -> list[str]:
    return [process.name for each in plan.nodes if each.name == node for process in each.processes]


def process(plan: Plan, node: str, name: str) -> Process:
    return next(
        process for each in plan.nodes if each.name == node for process in each.processes if process.name == name
    )


def flag(found: Process, name: str) -> str | None:
    return found.argv[found.argv.index(name) + 1] if name in found.argv else None


def test_nemo_gym_runs_on_the_environment_nodes_and_no_longer_on_the_others(project: Project) -> None:
    plan = project.plan("nodes.rollout=2", "nodes.environment=2")
    assert [node.name for node in plan.nodes] == [
        *("rollout-0", "rollout-1", "environment-0", "environment-1", "train-0", "train-1")
    ]
    assert [node.rank for node in plan.nodes] == list(range(6))
    assert names(plan, "rollout-1") == ["vllm-0", "rollout-server"]
    assert names(plan, "environment-1") == ["gym", "environment-server"]
    gym, server = (process(plan, "environment-1", name) for name in ("gym", "environment-server"))
    assert {gym.role, server.role} == {"environment"}
    settings = yaml.safe_load(re.sub(r"\{port:[^}]*\}", "1", gym.files[0].text))
    assert settings["default_host"] == "127.0.0.1", "it cannot be exposed safely"
    assert settings["policy_base_url"] == "http://127.0.0.1:1/v1"
    assert server.listen == ("environment-1",)
    assert (flag(server, "--rollouts"), flag(server, "--judges")) == ("{endpoints:rollout}", None)
    rollout = process(plan, "rollout-0", "rollout-server")
    assert flag(rollout, "--environments") == "{endpoints:environment}"
    assert not rollout.ports
    assert "--gym-port" not in rollout.argv


def test_every_address_that_a_process_waits_for_is_published_by_some_node(judged: Project) -> None:
    plan = judged.plan("nodes.environment=2", "nodes.judge=2", more=ON_NODES)
    declared = declared_endpoints(plan)
    ranks = {node.name: node.rank for node in plan.nodes}
    for kind in ("environment", "judge"):
        assert [declared[f"{kind}-{number}"] for number in range(2)] == [
            ranks[f"{kind}-{number}"] for number in range(2)
        ]
    for node in plan.nodes:
        for each in node.processes:
            wanted_endpoints(each, declared)
    wanted = wanted_endpoints(process(plan, "environment-0", "environment-server"), declared)
    assert wanted == {"rollout-0", "judge-0", "judge-1"}
    assert Plan.from_json(plan.to_json()) == plan


def test_a_judge_node_serves_the_judge_alone_with_its_first_gpus(judged: Project) -> None:
    wanted = (
        "nodes.judge=1",
        "nodes.rollout=1",
        FEW,
        "judge.vllm.tensor_parallel_size=4",
        "vllm.tensor_parallel_size=2",
    )
    plan = judged.plan(*wanted, more=CUDA + ON_NODES)
    assert names(plan, "judge-0") == ["judge", "judge-server"]
    judge, server = (process(plan, "judge-0", name) for name in ("judge", "judge-server"))
    assert judge.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert "--uds {private_dir}/judge.sock" in " ".join(judge.argv)
    assert server.listen == ("judge-0",)
    assert names(plan, "rollout-0") == [*(f"vllm-{number}" for number in range(4)), "gym", "rollout-server"]
    assert flag(process(plan, "rollout-0", "rollout-server"), "--judges") == "{endpoints:judge}"


def test_environment_nodes_ask_a_judge_on_the_rollout_nodes_there_and_one_outside_themselves(judged: Project) -> None:
    on_rollout = judged.plan("nodes.environment=1", more=JUDGE + "}\n")
    assert names(on_rollout, "rollout-0") == ["judge", "vllm-0", "rollout-server"]
    server = process(on_rollout, "environment-0", "environment-server")
    assert flag(server, "--judges") == "{endpoints:rollout}"
    outside = judged.plan("nodes.environment=1", more="judge: {url: https://a.example/v1, model_name: big}\n")
    assert flag(process(outside, "environment-0", "environment-server"), "--judges") is None


def test_a_role_has_its_environment_variables_on_its_nodes(judged: Project) -> None:
    more = ON_NODES + "cluster: {role_env: {environment: {FOR: environment}, judge: {FOR: judge}}}\n"
    plan = judged.plan("nodes.environment=1", "nodes.judge=1", more=more)
    found = {(node.role, each.env.get("FOR")) for node in plan.nodes for each in node.processes}
    assert found == {("rollout", None), ("judge", "judge"), ("environment", "environment"), ("train", None)}


@pytest.mark.parametrize(
    ("overrides", "section", "says"),
    [
        (["nodes.judge=1"], JUDGE + "}\n", "nodes.judge: 1 nodes for the judge, but judge.placement is rollout: set"),
        ([], ON_NODES, "judge.placement: nodes gives the judge nodes of its own, but nodes.judge is 0: say how many"),
        (
            ["nodes.judge=1", FEW, "judge.vllm.tensor_parallel_size=16"],
            CUDA + ON_NODES,
            "judge.vllm: the judge takes 16 GPUs, but a node has 8 (gpus_per_node).",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(judged: Project, overrides: list[str], section: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_for(judged.write(section), overrides)
    assert says in str(caught.value)


def components(plan: Plan) -> list[tuple[list[str], Directives]]:
    """Names of the nodes and directives of each component."""
    return [
        ([node.name for node in plan.nodes if node.component == index], options)
        for index, options in enumerate(sbatch_options(plan))
    ]


def test_environment_nodes_ask_for_no_gpus_and_so_make_the_job_a_heterogeneous_one(judged: Project) -> None:
    plan = judged.plan("nodes.judge=1", "nodes.environment=2", FEW, more=CUDA + SLURM + ON_NODES)
    found = components(plan)
    assert [nodes for nodes, _ in found] == [
        ["rollout-0", "judge-0"],
        ["environment-0", "environment-1"],
        ["train-0", "train-1"],
    ]
    assert [options.get("gpus-per-node") for _, options in found] == ["8", None, "8"]
    assert [options["nodes"] for _, options in found] == ["2", "2", "2"]
    assert {options["partition"] for _, options in found} == {"gpu"}
    assert srun_options(plan.launch, len(plan.nodes))["het-group"] == "0,1,2"


def test_each_role_may_ask_for_nodes_of_its_own(judged: Project) -> None:
    more = CUDA + (
        "cluster: {kind: slurm, slurm: {gres: 'gpu:h100:8', gpu-bind: closest,"
        " environment: {partition: cpu, constraint: fat}, judge: {gres: 'gpu:l40s:8', constraint: big}}}\n"
    )
    found = components(judged.plan("nodes.judge=1", "nodes.environment=1", FEW, more=more + ON_NODES))
    assert [nodes for nodes, _ in found] == [["rollout-0"], ["judge-0"], ["environment-0"], ["train-0", "train-1"]]
    assert [options.get("gres") for _, options in found] == ["gpu:h100:8", "gpu:l40s:8", None, "gpu:h100:8"]
    assert ["gpus-per-node" in options for _, options in found] == [False] * 4
    assert ["gpu-bind" in options for _, options in found] == [True, True, False, True]
    assert found[2][1]["partition"] == "cpu"


def test_roles_that_ask_for_the_same_share_one_plain_allocation(project: Project) -> None:
    same = project.plan("nodes.environment=1", more="cluster: {kind: slurm, slurm: {partition: cpu}}\n")
    assert same.launch.components == ()
    assert {node.component for node in same.nodes} == {0}
    wanted = "cluster: {kind: slurm, slurm: {environment: {gpus-per-node: 8}}}\n"
    with_gpus = components(project.plan("nodes.environment=1", FEW, more=CUDA + wanted))
    assert [(nodes, options["nodes"]) for nodes, options in with_gpus] == [
        (["rollout-0", "environment-0", "train-0", "train-1"], "4")
    ]
    assert with_gpus[0][1]["gpus-per-node"] == "8"
    both = "cluster: {kind: slurm, slurm: {rollout: {partition: cpu}, train: {partition: cpu}}}\n"
    ((nodes, options),) = components(project.plan(more=both))
    assert (nodes, options["partition"], options["nodes"]) == (["rollout-0", "train-0", "train-1"], "cpu", "3")


def test_a_local_job_has_them_as_simulated_nodes(judged: Project) -> None:
    plan = judged.plan("nodes.environment=1", "nodes.judge=1", more=ON_NODES)
    assert [node.name for node in plan.nodes] == ["rollout-0", "judge-0", "environment-0", "train-0", "train-1"]
    assert {node.component for node in plan.nodes} == {0}


@pytest.mark.parametrize("later", ["", ", train: {mem: null}"])
def test_what_sbatch_would_carry_over_into_a_later_component_is_refused(project: Project, later: str) -> None:
    slurm = "cluster: {kind: slurm, slurm: {rollout: {partition: cpu, mem: 64G}" + later + "}}\n"
    with pytest.raises(UserError) as caught:
        project.plan(more=slurm)
    assert "cluster.slurm.rollout.mem: sbatch takes it over into later components" in str(caught.value)
    assert "here that of the role train" in str(caught.value)


def test_what_every_component_says_is_not_carried_over(project: Project) -> None:
    slurm = "cluster: {kind: slurm, slurm: {mem: '0', rollout: {partition: cpu, mem: 64G}, train: {exclude: node3}}}\n"
    assert [options.get("mem") for _, options in components(project.plan(more=slurm))] == ["64G", "0"]


@pytest.mark.parametrize("later", ["{exclude: null}", "{exclude: false}"])
def test_a_null_that_sbatch_would_undo_is_refused(judged: Project, later: str) -> None:
    options = "{partition: cpu, exclude: node3, judge: {partition: fat}, train: " + later + "}"
    slurm = "cluster: {kind: slurm, slurm: " + options + "}\n"
    message = judged.refused("nodes.judge=1", more=slurm + ON_NODES)
    assert message == (
        "top.yaml:2: cluster.slurm.train.exclude: does not take it away: sbatch gives what earlier components of a "
        "heterogeneous job say, here cluster.slurm.exclude, to later ones that say nothing: give train a value of its "
        "own. (cluster.slurm.exclude: top.yaml:2)"
    )


def test_a_null_of_the_first_component_is_none_of_the_later_ones(project: Project) -> None:
    slurm = "cluster: {kind: slurm, slurm: {qos: high, rollout: {partition: cpu, qos: null}}}\n"
    assert [options.get("qos") for _, options in components(project.plan(more=slurm))] == [None, "high"]
