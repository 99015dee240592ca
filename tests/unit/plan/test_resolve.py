"""The Plan: the same bytes for the same inputs, and what every role needs to start."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from small_project import Project, make_model, row, write_rows

from hpc_gym.node.placeholders import declared_endpoints, wanted_endpoints
from hpc_gym.plan.plan import Plan, Process
from hpc_gym.plan.resolve import plan_for, resolve
from hpc_gym.shipped import shipped


def processes(plan: Plan) -> dict[str, Process]:
    return {process.name: process for node in plan.nodes for process in node.processes}


def test_the_same_inputs_give_the_same_bytes(project: Project) -> None:
    first, second = project.plan("seed=5").to_json(), project.plan("seed=5").to_json()
    assert first == second
    assert Plan.from_json(first).to_json() == first
    assert project.plan("seed=6").to_json() != first


def test_the_resolved_experiment_gives_the_same_plan_again(project: Project, tmp_path: Path) -> None:
    # NeMo Gym's own interpolation must come through as it is, also the second time.
    config = "{mcqa: {resources_servers: {mcqa: {value: '\\${policy_base_url}'}}}}"
    more = f"vars: {{dir: .}}\nenvironments: {{mcqa: {{config: {config}}}}}\n"
    resolved = resolve(project.write(more), ["data.train.0.path=${vars.dir}/reasoning.jsonl"])
    elsewhere = tmp_path / "runs" / "experiment.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(resolved.experiment_yaml())
    assert plan_for(elsewhere) == resolved.plan


def test_rollout_nodes_come_first_and_ranks_count_through(project: Project) -> None:
    plan = project.plan("nodes.rollout=2", "nodes.train=2", "ranks_per_node=3", "grpo.per_device_train_batch_size=2")
    assert [(node.rank, node.name) for node in plan.nodes] == [
        (0, "rollout-0"),
        (1, "rollout-1"),
        (2, "train-0"),
        (3, "train-1"),
    ]
    assert [process.name for process in plan.nodes[3].processes] == ["rank-3", "rank-4", "rank-5"]
    env = processes(plan)["rank-4"].env
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("4", "1", "6", "3")
    assert plan.training.world_size == 6
    assert plan.training.prompts_per_step == 3


def test_every_placeholder_of_every_process_stands_for_something(project: Project) -> None:
    plan = project.plan("nodes.rollout=2")
    declared = declared_endpoints(plan)
    assert {"rollout-0", "rollout-1", "train-master"} <= set(declared)
    known = re.compile(
        r"run_dir|attempt|attempt_dir|secrets|node|address|interface|private_dir|python|"
        r"port:(policy|gym-head|gym|gym\+99)|fd:rollout-\d|host:train-master|portof:train-master|endpoints:rollout"
    )
    for process in processes(plan).values():
        wanted_endpoints(process, declared)
        for text in (*process.argv, *process.env.values(), *(file.text for file in process.files)):
            for found in re.findall(r"(?<!\$)\{([a-z_]+(?::[\w.+-]+)?)\}", text):
                assert known.fullmatch(found), found


def test_vllm_is_started_so_that_only_its_socket_answers(project: Project) -> None:
    argv = processes(project.plan())["vllm-0"].argv
    text = " ".join(argv)
    assert argv[:3] == ("vllm", "serve", str(project.folder / "model"))
    assert "--uds {private_dir}/vllm-0.sock" in text
    assert "--host" not in argv
    assert "--port" not in argv
    for flags in (
        "--enable-scale-out",
        "--worker-extension-cls hpc_gym.weights.worker.WorkerExtension",
        '--weight-transfer-config {"backend": "hpc_gym"}',
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--max-model-len 2048",
        "--enable-auto-tool-choice",
        "--tool-call-parser hermes",
        "--dtype float32",
        "--kv-cache-memory-bytes 1073741824",
    ):
        assert flags in text
    assert processes(project.plan())["vllm-0"].env["VLLM_SERVER_DEV_MODE"] == "1"


def test_every_runtime_of_a_process_is_in_the_plan(project: Project) -> None:
    plan = project.plan()
    assert {process.runtime for process in processes(plan).values()} == set(plan.runtimes)


def test_nemo_gym_gets_one_configuration_that_wins_over_the_environments(project: Project) -> None:
    more = "environments: {mcqa: {config: {mcqa: {resources_servers: {mcqa: {grading_mode: strict}}}}}}\n"
    plan = project.plan(more=more)
    gym = processes(plan)["gym"]
    paths = re.fullmatch(r"\+config_paths=\['(.*)'\]", gym.argv[3])
    assert paths is not None
    assert paths[1].split("','") == [
        "responses_api_models/vllm_model/configs/vllm_model.yaml",
        "environments/reasoning_gym/config.yaml",
        "resources_servers/mcqa/configs/mcqa.yaml",
        "{attempt_dir}/gym/{node}.yaml",
    ]
    (file,) = gym.files
    text = re.sub(r"\{port:[^}]*\}", "1", file.text)
    assert yaml.safe_load(text) == {
        "policy_base_url": "http://127.0.0.1:1/v1",
        "policy_api_key": "unused",
        "policy_model_name": "policy",
        "skip_venv_if_present": True,
        "uv_venv_dir": f"{plan.runtimes['gym'].root}/servers",
        "default_host": "127.0.0.1",
        "head_server": {"host": "127.0.0.1", "port": 1},
        "port_range_low": 1,
        "port_range_high": 1,
        "mcqa": {"resources_servers": {"mcqa": {"grading_mode": "strict"}}},
    }


def test_replicas_get_gpus_of_their_own(project: Project) -> None:
    more = "gpus_per_node: 8\nruntimes: {device: cuda, inference: inference-cpu, train: train-cpu}\n"
    plan = project.plan("vllm.tensor_parallel_size=2", "grpo.per_device_train_batch_size=1", more=more)
    assert plan.rollout.replicas == 4
    assert [processes(plan)[f"vllm-{k}"].env["CUDA_VISIBLE_DEVICES"] for k in range(4)] == ["0,1", "2,3", "4,5", "6,7"]
    assert plan.training.world_size == 16
    assert plan.training.weight_transfer == "nccl"
    assert project.plan("rollouts.replicas=2", "grpo.per_device_train_batch_size=1", more=more).rollout.replicas == 2


def test_a_wandb_run_keeps_its_id_over_attempts_and_differs_between_runs(project: Project) -> None:
    more = "tracking: {wandb: {project: p}}\n"
    first, again, other = (project.plan(f"name={name}", more=more).training.wandb for name in ("a", "a", "b"))
    assert first is not None
    assert other is not None
    assert first == again
    assert first["run_id"] != other["run_id"]
    assert first["name"] == "a"
    assert project.plan().training.wandb is None


def test_what_the_trainer_needs_follows_from_the_experiment(project: Project) -> None:
    training = project.plan(
        "seed=7", "deepspeed.zero_stage=3", "deepspeed.zero_optimization.overlap_comm=true"
    ).training
    assert training.deepspeed == {"zero_optimization": {"overlap_comm": True, "stage": 3}}
    assert training.grpo["seed"] == 7
    assert training.grpo["model_init_kwargs"] == {"dtype": "float32"}
    assert (training.grpo["bf16"], training.grpo["fp16"]) == (False, False)
    assert [(source.rows, source.weight) for source in training.sources] == [(2, 2.0), (3, 1.0)]
    assert training.prompts_per_step == 3
    assert not training.evaluation.at_start


def test_evaluation_happens_when_there_are_rows_for_it(project: Project) -> None:
    more = "data: {eval: [{environment: mcqa, path: mcqa.jsonl}]}\nevaluation: {max_output_tokens: 77, every: 5}\n"
    evaluation = project.plan(more=more).training.evaluation
    assert (evaluation.at_start, evaluation.at_end, evaluation.every) == (True, True, 5)
    assert evaluation.sampling.max_output_tokens == 77
    assert not project.plan("evaluation.at_start=false", more=more).training.evaluation.at_start


def test_a_name_is_taken_from_the_file_when_none_is_given(project: Project) -> None:
    text = (project.folder / "small.yaml").read_text().replace("name: small\n", "")
    (project.folder / "unnamed.yaml").write_text(text)
    plan = plan_for("unnamed.yaml")
    assert plan.name == "unnamed"
    assert plan.run_dir == str(project.folder / "runs" / "unnamed")


def test_a_plain_allocation_where_roles_ask_for_the_same(project: Project) -> None:
    more = "cluster: {kind: slurm, slurm: {partition: gpu, time: '1:00:00'}}\n"
    launch = project.plan(more=more).launch
    assert launch.kind == "slurm"
    assert launch.options == {"partition": "gpu", "time": "1:00:00"}
    assert launch.components == ()


def test_a_heterogeneous_job_where_they_do_not(project: Project) -> None:
    more = "cluster: {kind: slurm, slurm: {partition: gpu, train: {constraint: h100}}}\n"
    plan = project.plan(more=more)
    assert plan.launch.components == ({"nodes": 1}, {"nodes": 2, "constraint": "h100"})
    assert [node.component for node in plan.nodes] == [0, 1, 1]


def test_gpus_are_asked_for_unless_the_profile_does(project: Project) -> None:
    more = (
        "gpus_per_node: 4\nruntimes: {device: cuda, inference: inference-cpu, train: train-cpu}\n"
        "grpo: {per_device_train_batch_size: 1}\ncluster: {kind: slurm, slurm: {partition: gpu}}\n"
    )
    assert project.plan(more=more).launch.options["gpus_per_node"] == 4
    assert "gpus_per_node" not in project.plan("cluster.slurm.gres=gpu:4", more=more).launch.options


def test_variables_of_the_profile_win_for_their_role_only(project: Project) -> None:
    more = "cluster: {env: {A: all}, role_env: {train: {OMP_NUM_THREADS: '7'}}}\n"
    plan = project.plan(more=more)
    assert plan.env["A"] == "all"
    assert processes(plan)["rank-0"].env["OMP_NUM_THREADS"] == "7"
    assert processes(plan)["vllm-0"].env["OMP_NUM_THREADS"] == "1"


def test_no_secret_is_in_a_plan(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    plan = project.plan(more="tracking: {wandb: {project: p}}\n")
    assert "planted-secret" not in plan.to_json()
    assert plan.secrets == ("WANDB_API_KEY", "HF_TOKEN")


@pytest.mark.parametrize("name", sorted(file.stem for file in (shipped("configs") / "experiments").glob("*.yaml")))
def test_every_shipped_experiment_resolves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "cache"))
    overrides, cluster = ["vars.data_dir=data"], "slurm-example"
    if name == "demo":
        make_model(tmp_path / "demo/model")
        overrides, cluster = ["vars.demo_dir=demo"], "local"
    tree = yaml.safe_load((shipped("configs") / f"experiments/{name}.yaml").read_text())
    for source in (*tree["data"]["train"], *tree["data"]["eval"]):
        write_rows(source["path"].replace("${vars.data_dir}", "data").replace("${vars.demo_dir}", "demo"))
    plan = plan_for(name, overrides, cluster)
    assert plan.launch.kind == ("local" if name == "demo" else "slurm")
    assert json.loads(plan.to_json())["name"] == plan.name
    weights = [source.weight for source in plan.training.sources]
    # The comments in these files promise that every step has exactly the shares of the mixture.
    assert plan.training.prompts_per_step % sum(weights) == 0


def test_the_five_node_example_is_one_rollout_and_four_training_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("workplace_assistant/train", "workplace_assistant/validation", "reasoning_gym/train"):
        (tmp_path / f"data/{path}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/{path}.jsonl").write_text(row())
    plan = plan_for("five-node", cluster="slurm-example")
    assert [node.role for node in plan.nodes] == ["rollout", "train", "train", "train", "train"]
    assert plan.training.world_size == 32
    assert dataclasses.asdict(plan)["training"]["deepspeed"]["zero_optimization"]["stage"] == 3
    assert len(plan.nodes[0].processes) == 3


def test_runs_go_below_where_the_user_submits_whoever_names_their_folder(project: Project) -> None:
    profile = project.folder / "configs/clusters/site.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("cluster: {kind: slurm, runs_dir: results}\nruntimes: {device: cpu}\n")
    assert project.plan(cluster="site").run_dir == str(project.folder / "results/small")
