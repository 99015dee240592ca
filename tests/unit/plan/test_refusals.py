"""What an experiment must not say, across its sections and roles: each is refused with a sentence at the key to
change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import Project, row

from hpc_gym.errors import UserError
from hpc_gym.plan.checks import refuse_absent_hub_model
from hpc_gym.plan.resolve import plan_for

CUDA = "runtimes: {device: cuda, inference: inference-cpu, train: train-cpu}\n"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        # the batch, as TRL demands
        (
            ["grpo.num_generations=5"],
            "grpo.num_generations: 5 must divide the generation batch of 12 completions (6 per device x 2 ranks x "
            "steps_per_generation 1), for a group must not be cut; allowed: 2, 3, 4, 6, 12, or change",
        ),
        (
            ["grpo.num_generations=1"],
            "grpo.num_generations: must be a whole number of at least 2, not 1: a group's baseline",
        ),
        (
            ["grpo.max_steps=99999999999"],
            "grpo.max_steps: 99999999999 is more than anybody means: at most 1,000,000,000",
        ),
        (["grpo.learning_rate=.nan"], "grpo.learning_rate: must be a finite number, not nan."),
        (
            ["deepspeed.zero_optimization.reduce_bucket_size=.inf"],
            "must be a finite number, not inf",
        ),
        (["vllm.max_num_seqs=99999999999999999999"], "vllm.max_num_seqs: 99999999999999999999 is too large for"),
        (["vllm.max_model_len=-8"], "vllm.max_model_len: must be at least 1, and is -8."),
        (["vllm.tensor_parallel_size=0"], "vllm.tensor_parallel_size: must be at least 1, and is 0."),
        (
            ["vllm.gpu_memory_utilization=7"],
            "vllm.gpu_memory_utilization: must be a share above 0 and up to 1, and is 7.",
        ),
        (["cluster.chain=3"], "cluster.chain: only Slurm jobs wait for one another, and cluster.kind is local"),
        (["secrets=[A B]"], "secrets.0: 'A B' is no name of an environment variable: letters, digits and '_'"),
        (['cluster.env={"A-B": x}'], "cluster.env.A-B: 'A-B' is no name of an environment variable"),
        (["grpo.learning_rate=-1e-5"], "grpo.learning_rate: must not be negative, and is -1e-05."),
        (
            ["supervision.heartbeat_s=100"],
            "supervision.heartbeat_s: a node that is heard of every 100 s would count as lost after 10 s of silence "
            "(supervision.node_silent_s) when one heartbeat is late: at most 5.",
        ),
        (["grpo.max_steps=0"], "grpo.max_steps: must be a whole number of at least 1, not 0."),
        (
            ["grpo.generation_batch_size=13"],
            "grpo.generation_batch_size: 13 must be a multiple of the batch of one micro-step, 12",
        ),
        (
            ["grpo.generation_batch_size=12", "grpo.steps_per_generation=1"],
            "grpo.generation_batch_size: set this or steps_per_generation, not both",
        ),
        # on-policy
        (
            ["grpo.steps_per_generation=2"],
            "max_staleness: 0 means strictly on-policy, but steps_per_generation = 2 is more than "
            "gradient_accumulation_steps = 1",
        ),
        (
            ["grpo.num_iterations=2", "grpo.gradient_accumulation_steps=2"],
            "grpo.num_iterations: 2 trains on every rollout again",
        ),
        (
            ["grpo.gradient_accumulation_steps=3", "grpo.steps_per_generation=2"],
            "grpo.gradient_accumulation_steps: 3 must divide, or be a multiple of, steps_per_generation x "
            "num_iterations = 2",
        ),
        (["max_staleness=1"], "max_staleness: 1 is reserved"),
        # sampling
        (["rollouts.temperature=0"], "rollouts.temperature: 0 makes all rollouts of a group equal"),
        (["rollouts.top_p=0.9", "on_policy_tolerance=1e-4"], "rollouts.top_p: 0.9 cuts the distribution"),
        (
            ["grpo.multi_objective_aggregation=normalize_then_sum"],
            "grpo.multi_objective_aggregation: 'normalize_then_sum' would normalize",
        ),
        (
            ["rollouts.max_output_tokens=4096"],
            "rollouts.max_output_tokens: 4096 tokens a turn do not fit into vllm.max_model_len = 2048",
        ),
        (["vllm.max_model_len=null"], "vllm: max_model_len is missing"),
        # roles
        (["gpus_per_node=2"], "gpus_per_node: 2 GPUs, but runtimes.device is cpu"),
        (["nodes.judge=1"], "nodes.judge: 1 nodes for the judge, but there is no section judge: set judge.model and"),
        (["weights.transfer=nccl"], "weights.transfer: 'nccl' needs GPUs"),
        (["weights.transfer=adapter"], "weights.transfer: 'adapter' is reserved"),
        (["runtimes.gym=gmy"], "runtimes.gym: runtime 'gmy' does not exist; the runtimes are: "),
        (["cluster.runtime.kind=apptainer"], "cluster.runtime.images: names no image for 'inference'"),
        (["cluster.runtime.kind=modules"], "cluster.runtime.modules: is empty"),
        # evaluation and environments
        (["evaluation.at_end=true"], "evaluation: asks for an evaluation, but data.eval names no rows"),
        (
            ["data.train.0.environment=reasoning_gm"],
            "data.train.0.environment: 'reasoning_gm' is not configured; did you mean 'reasoning_gym'?",
        ),
        # model
        (["model.path=nowhere"], "model.path: there is no folder"),
        (["model.path=./org/name"], "model.path: there is no folder"),
        (["model.path=small.yaml"], "small.yaml is a file; a model is a folder"),
        (["model.path=."], "is no model: it has no config.json and no weights (*.safetensors) and no tokenizer"),
        # what hpc-gym owns
        (["grpo.output_dir=x"], "grpo.output_dir: hpc-gym owns this option: checkpoints and the model go into the run"),
        (["grpo.temperature=1"], "grpo.temperature: hpc-gym owns this option: the rollout servers sample"),
        (["vllm.port=8000"], "vllm.port: hpc-gym owns this option: vLLM listens on a Unix socket"),
        (["vllm.api-key=x"], "vllm.api-key: hpc-gym owns this option: vLLM listens on a Unix socket"),
        (["deepspeed.train_batch_size=8"], "deepspeed.train_batch_size: hpc-gym owns this option: it follows from"),
        (["deepspeed.zero_stage=5"], "deepspeed.zero_stage: 5 is not allowed; allowed: 0, 1, 2, 3."),
        (["deepspeed.zero_optimization.stage=3"], "deepspeed.zero_optimization.stage: set deepspeed.zero_stage."),
    ],
)
def test_refused(project: Project, overrides: list[str], says: str) -> None:
    assert says in project.refused(*overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "gpus_per_node: 0 GPUs, but runtimes.device is cuda"),
        (
            ["gpus_per_node=4", "vllm.tensor_parallel_size=8"],
            "vllm.tensor_parallel_size: tensor_parallel_size x pipeline_parallel_size x data_parallel_size = 8 GPUs "
            "per vLLM, "
            "times 1 on a rollout node, is 8; a node has 4 (gpus_per_node).",
        ),
        (
            ["gpus_per_node=4", "vllm.tensor_parallel_size=2", "rollouts.replicas=3"],
            "rollouts.replicas: tensor_parallel_size x pipeline_parallel_size x data_parallel_size = 2 GPUs per "
            "vLLM, times 3 "
            "on a rollout node, is 6; a node has 4",
        ),
        (["gpus_per_node=2", "ranks_per_node=4"], "ranks_per_node: 4 training ranks, but a node has 2 GPUs"),
    ],
)
def test_gpus_are_counted(project: Project, overrides: list[str], says: str) -> None:
    assert says in project.refused(*overrides, more=CUDA)


def test_a_missing_step_count_is_asked_for(project: Project) -> None:
    text = (project.folder / "small.yaml").read_text().replace("  max_steps: 10\n", "")
    (project.folder / "small.yaml").write_text(text)
    assert "grpo: max_steps is missing" in project.refused()


def test_checkpoints_fall_between_generation_batches(project: Project) -> None:
    overrides = ["grpo.gradient_accumulation_steps=2", "grpo.steps_per_generation=2", "checkpoints.every=7"]
    assert project.plan(*overrides).training.checkpoint_every == 7  # a cycle is one step here


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "rows.jsonl is empty"),
        (row() * 16 + "{oops\n", "rows.jsonl:17: not JSON"),
        ('{"question": "x"}\n', "rows.jsonl:1: the row lacks 'responses_create_params'"),
        (
            row() + row("mcqa_simple_agent"),
            "rows.jsonl:2: agent_ref names 'mcqa_simple_agent', but the environment 'reasoning_gym' is served by "
            "'reasoning_gym_simple_agent'; that agent serves the environment 'mcqa'.",
        ),
        (
            row("nobody"),
            "rows.jsonl:1: agent_ref names 'nobody', but the environment 'reasoning_gym' is served by "
            "'reasoning_gym_simple_agent'; no configured environment has that agent.",
        ),
    ],
)
def test_bad_rows_are_refused_where_the_experiment_names_them(project: Project, text: str, says: str) -> None:
    (project.folder / "rows.jsonl").write_text(text)
    message = project.refused(more="data:\n  train:\n    - {environment: reasoning_gym, path: rows.jsonl}\n")
    assert message.startswith("top.yaml:4: data.train.0.path: ")
    assert says in message


def test_a_missing_rows_file_is_named_in_full(project: Project) -> None:
    message = project.refused("data.train.0.path=no.jsonl")
    assert message == (
        f"override 'data.train.0.path=no.jsonl': data.train.0.path: there is no file {project.folder / 'no.jsonl'}."
    )


def test_all_problems_come_at_once(project: Project) -> None:
    message = project.refused("grpo.num_generations=5", "data.train.0.path=no.jsonl", "model.path=./nothing")
    assert message.startswith("3 problems:\n")


def test_a_model_without_a_chat_template_is_refused(project: Project) -> None:
    (project.folder / "model" / "chat_template.jinja").unlink()
    message = project.refused()
    assert "model.path: the model" in message and "has no chat template (chat_template.jinja, or" in message
    assert project.plan("vllm.chat_template=mine.jinja")
    (project.folder / "model" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert project.plan()


def test_environments_that_define_one_server_differently_are_refused(project: Project) -> None:
    for name, steps in (("one", 1), ("two", 2)):
        (project.folder / f"{name}.yaml").write_text(
            "server: {resources_servers: {mcqa: {entrypoint: app.py}}}\n"
            f"{name}_agent: {{responses_api_agents: {{simple_agent: {{max_steps: 3}}}}}}\n"
            f"shared: {{responses_api_models: {{vllm_model: {{steps: {steps}}}}}}}\n"
        )
    more = "environments:\n  one: {config_paths: [one.yaml]}\n  two: {config_paths: [two.yaml]}\n"
    message = project.refused(more=more)
    assert "environments.two: its server 'shared' is defined otherwise by the environment 'one'" in message
    assert "'server'" not in message  # defined alike by both, so they share it


def test_an_environment_file_of_ones_own_needs_no_code(project: Project) -> None:
    (project.folder / "mine.yaml").write_text(
        "mine: {resources_servers: {mcqa: {entrypoint: app.py}}}\n"
        "mine_agent: {responses_api_agents: {simple_agent: {entrypoint: app.py}}}\n"
    )
    more = "environments: {mine: {config_paths: [mine.yaml]}}\ndata: {train: [{environment: mine, path: mine.jsonl}]}\n"
    (project.folder / "mine.jsonl").write_text(row("mine_agent"))
    environment = project.plan(more=more).environments[-1]
    assert (environment.name, environment.agent) == ("mine", "mine_agent")
    assert environment.config_paths == (str(project.folder / "mine.yaml"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {resources_servers: {x: {}}}\n", "define no agent"),
        (
            "a: {responses_api_agents: {x: {}}}\nb: {responses_api_agents: {x: {}}}\n",
            "define several agents: set agent to one of a, b.",
        ),
        ("a: {\n", "env.yaml:2: not YAML"),
    ],
)
def test_an_environment_without_one_agent_is_refused(project: Project, text: str, says: str) -> None:
    (project.folder / "env.yaml").write_text(text)
    assert says in project.refused(more="environments: {mine: {config_paths: [env.yaml]}}\n")


def test_a_wrong_batch_tells_where_its_sizes_are_set(project: Project) -> None:
    message = project.refused("nodes.train=3", more="grpo: {per_device_train_batch_size: 1}\n")
    assert "small.yaml:" in message
    assert message.endswith("(grpo.per_device_train_batch_size: top.yaml:2; nodes.train: override 'nodes.train=3')"), (
        message
    )


def test_a_missing_environment_file_is_refused(project: Project) -> None:
    message = project.refused(more="environments: {mine: {config_paths: [./env.yaml], agent: a}}\n")
    assert "top.yaml:2: environments.mine.config_paths.0: there is no file env.yaml." in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{'no': 'json'}", "config.json is no model's configuration: Expecting property name"),
        ("{}", "config.json is no model's configuration: it has no 'model_type'"),
        ("[]", "config.json is no model's configuration: it has no 'model_type'"),
    ],
)
def test_a_model_whose_configuration_names_none_is_refused(project: Project, config: str, says: str) -> None:
    folder = project.folder / "torn"
    folder.mkdir()
    for name, text in (("config.json", config), ("model.safetensors", ""), ("tokenizer.json", "{}")):
        (folder / name).write_text(text)
    assert says in project.refused("model.path=./torn")


def test_who_lacks_the_demos_model_is_told_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="`hpc-gym demo` makes the demo's model there"):
        plan_for("demo")


def test_a_hub_model_must_be_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a job never downloads"):
        refuse_absent_hub_model("org/name", tmp_path)
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refuse_absent_hub_model("org/name", tmp_path)
    refuse_absent_hub_model("/a/folder", tmp_path)


def test_a_local_job_is_refused_when_its_hub_model_is_not_there(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(project.folder / "hub"))
    assert "model.path: the model org/name is not in the cache" in project.refused("model.path=org/name")
    slurm = "cluster: {kind: slurm}\n"  # the cluster's cache may be elsewhere
    assert project.plan("model.path=org/name", more=slurm).training.model == "org/name"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "environments/reasoning_gm/config.yaml",
            "NeMo Gym has no configuration 'environments/reasoning_gm/config.yaml'",
        ),
        ("environments/reasoning_gm/config.yaml", "environments/reasoning_gym/config.yaml"),
        ("resources_servers/swe_pivot/configs/nothing.yaml", "nearest in nemo-gym 0.4.0: "),
        (
            "environments/abstention/config.yaml",
            "it asks the model server 'genrm_model' (a judge), which nothing defines",
        ),
        ("resources_servers/asr_with_pc/configs/asr_with_pc.yaml", "its servers need jiwer"),
    ],
)
def test_an_environment_that_nemo_gym_cannot_serve_is_refused(project: Project, path: str, says: str) -> None:
    assert says in project.refused(more=f"environments: {{mine: {{config_paths: [{path}]}}}}\n")


def test_an_agent_that_the_environment_lacks_is_refused_with_the_nearest(project: Project) -> None:
    message = project.refused("environments.mcqa.agent=mcqa_simple_agnt")
    assert "environments.mcqa.agent: 'mcqa_simple_agnt' is no agent of this environment; did you mean" in message
    assert "'mcqa_simple_agent'" in message


def test_any_environment_of_nemo_gym_is_added_by_its_path_alone(project: Project) -> None:
    path = "resources_servers/example_multi_step/configs/example_multi_step.yaml"
    plan = project.plan(more=f"environments: {{mine: {{config_paths: [{path}]}}}}\n")
    assert plan.environments[-1].agent == "example_multi_step_simple_agent"
