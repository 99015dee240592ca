"""Options of vLLM, TRL and DeepSpeed, and environment variables, that hpc-gym sets itself: each with the reason, and
what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_gym.config.problems import Problem
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.schema import Experiment

_SOCKET = "vLLM listens on a Unix socket in a private directory: in dev mode it must not be reachable"
_WEIGHTS = "the trainer's weights reach vLLM through hpc-gym's own extension; weights.transfer says how they travel"
_SAMPLING = "the rollout servers sample, not TRL: set it in the section rollouts"
_HUB = "a job never uploads: the trained model is in the run directory"
_DATA = "hpc-gym owns the order of the rows, so that a resume goes on with the next one"
_SAVES = "checkpoints fall where a generation batch ends: set the section checkpoints"
_EVALUATION = "set the section evaluation: held-out rows run in their environments, not through TRL"
_VLLM = "hpc-gym connects the trainer to vLLM: the sections vllm and rollouts say how it runs"
_MODEL = "set model.path"
_REVISION = "the trainer would load another one: download that revision and set model.path to its folder"
_DTYPE = "set model.dtype: vLLM and the trainer must use the same"
_PARTS = "hpc-gym starts every part of a vLLM: nnodes and the parallel sizes say how many there are"
_BATCH = "it follows from the section grpo"
_RANKS = "hpc-gym starts the ranks itself: nodes.train and ranks_per_node say how many there are"
_INTERFACE = "set cluster.network_interface, or cluster.role_env where one role differs"
_RAY = (
    "nobody else may reach the Ray of a job, whose files lie in a private directory: set cluster.scratch for its place"
)
_USAGE = "a job reports its usage to nobody: take it away"

VLLM: Mapping[str, str] = {
    "model": _MODEL,
    "tokenizer": "model.path holds the tokenizer too, for vLLM and the trainer must use the same",
    "dtype": _DTYPE,
    "seed": "set seed at the top of the experiment",
    "served_model_name": "NeMo Gym and the trainer know the model by hpc-gym's name for it",
    "host": _SOCKET,
    "port": _SOCKET,
    "uds": _SOCKET,
    "api_key": _SOCKET,
    "ssl_keyfile": _SOCKET,
    "ssl_certfile": _SOCKET,
    "ssl_ca_certs": _SOCKET,
    "root_path": _SOCKET,
    **dict.fromkeys(
        (
            "headless",
            "node_rank",
            "master_addr",
            "master_port",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_supervisor_port",
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "data_parallel_multi_port_external_lb",
        ),
        _PARTS,
    ),
    "worker_extension_cls": _WEIGHTS,
    "weight_transfer_config": _WEIGHTS,
    "enable_scale_out": "the rollout server needs vLLM's render, generate and derender endpoints",
    "generation_config": "a model folder's sampling defaults would change what is sampled, unknown to the trainer",
    "logprobs_mode": "the trainer compares its log-probabilities with those of the distribution that was sampled",
    "override_generation_config": "sampling is set in the section rollouts",
    "revision": _REVISION,
    "code_revision": _REVISION,
    "tokenizer_revision": _REVISION,
    "hf_token": "a command line is no place for it: HF_TOKEN of your environment travels with secrets",
    "grpc": _SOCKET,
    "grpc_port": _SOCKET,
    "config": "write the options into the section vllm",
}

_JUDGE_SOCKET = "the judge's vLLM listens on a Unix socket in a private directory, which the rollout server asks"

JUDGE_VLLM: Mapping[str, str] = {
    **{
        name: _JUDGE_SOCKET if reason == _SOCKET else reason
        for name, reason in VLLM.items()
        if reason in (_SOCKET, _PARTS) or name == "hf_token"
    },
    "nnodes": "a judge's vLLM runs on one node: set judge.vllm.tensor_parallel_size, or judge.url for a larger one",
    "model": "set judge.model",
    "served_model_name": "NeMo Gym knows it by hpc-gym's name for it",
    "seed": VLLM["seed"],
    "config": "write the options into the section judge.vllm",
}

GRPO: Mapping[str, str] = {
    "output_dir": "checkpoints and the model go into the run directory",
    "run_name": "set name, or tracking.wandb.name",
    "use_vllm": _VLLM,
    **{
        f"vllm_{name}": _VLLM
        for name in (
            "mode",
            "model_impl",
            "server_base_url",
            "server_host",
            "server_port",
            "server_timeout",
            "group_port",
            "enable_sleep_mode",
            "structured_outputs_regex",
            "gpu_memory_utilization",
            "max_model_length",
            "tensor_parallel_size",
        )
    },
    "vllm_importance_sampling_correction": "hpc-gym keeps it on",
    "deepspeed": "set the section deepspeed",
    "fsdp": "hpc-gym trains with DeepSpeed: set the section deepspeed",
    "fsdp_config": "hpc-gym trains with DeepSpeed: set the section deepspeed",
    "accelerator_config": "hpc-gym starts the ranks itself",
    "parallelism_config": "TRL's GRPO trains without sequence parallelism",
    "local_rank": "hpc-gym starts the ranks itself",
    "ddp_backend": "it follows from runtimes.device",
    "use_cpu": "set runtimes.device",
    "seed": "set seed at the top of the experiment",
    "data_seed": _DATA,
    "shuffle_dataset": _DATA,
    "remove_unused_columns": _DATA,
    "dataloader_drop_last": _DATA,
    "train_sampling_strategy": _DATA,
    "ignore_data_skip": _DATA,
    "num_train_epochs": f"{_DATA}: set grpo.max_steps",
    "max_prompt_length": "prompts are rendered by vLLM: set vllm.max_model_len",
    "temperature": _SAMPLING,
    "top_p": _SAMPLING,
    "top_k": "it would make vLLM sample another distribution than the trainer's log-probabilities are of",
    "min_p": "it would make vLLM sample another distribution than the trainer's log-probabilities are of",
    "repetition_penalty": "it would make vLLM sample another distribution than the trainer's log-probabilities are of",
    "generation_kwargs": _SAMPLING,
    "chat_template_kwargs": "vLLM renders the chats: set vllm.default_chat_template_kwargs",
    "cache_implementation": _SAMPLING,
    "use_transformers_paged": _SAMPLING,
    "use_transformers_continuous_batching": _SAMPLING,
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "auto_find_batch_size": "TRL refuses it for GRPO: a smaller batch would cut groups",
    "do_train": "the job trains",
    "do_eval": _EVALUATION,
    "do_predict": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "per_device_eval_batch_size": _EVALUATION,
    "num_generations_eval": "set evaluation.num_rollouts",
    "load_best_model_at_end": _SAVES,
    "metric_for_best_model": _SAVES,
    "greater_is_better": _SAVES,
    "save_strategy": _SAVES,
    "save_steps": _SAVES,
    "save_total_limit": "set checkpoints.keep",
    "save_only_model": "a resume needs the whole state",
    "save_on_each_node": "the run directory is on storage that all nodes share",
    "restore_callback_states_from_checkpoint": "hpc-gym resumes by itself",
    "resume_from_checkpoint": "hpc-gym resumes by itself, at the newest checkpoint that is whole",
    "reward_weights": "each environment's reward counts once: set the weights of data.train",
    "report_to": "set the section tracking",
    "project": "set tracking.wandb.project",
    "logging_strategy": "every step is logged",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "dataloader_num_workers": "rows are read by the rollout function",
    "ddp_timeout": "it follows from the environments' timeout_s",
    "disable_tqdm": "`hpc-gym status` shows the progress",
    "log_completions_hub_repo": _HUB,
    "trackio_space_id": _HUB,
    "trackio_bucket_id": _HUB,
    "trackio_static_space_id": _HUB,
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

DEEPSPEED: Mapping[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "gradient_clipping": "set grpo.max_grad_norm",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "wandb": "set the section tracking",
}

ZERO_STAGE = "set deepspeed.zero_stage"

VARIABLES: Mapping[str, str] = {
    "TMPDIR": "each node has a private directory for temporary files: set cluster.scratch to the folder it is made in",
    "PYTHONPATH": "it leads to the run directory's copy of hpc-gym: what else is imported belongs into an image "
    "(cluster.runtime.images) or an environment module (cluster.runtime.modules)",
    "NOTIFY_SOCKET": "through it a process tells its supervisor that it is ready: take it away",
    "VIRTUAL_ENV": "it names the runtime that a process is in: set the section runtimes, or cluster.runtime",
    "WANDB_DIR": "W&B's files lie in the run directory: set cluster.runs_dir",
    "WANDB_MODE": "set tracking.wandb.mode",
    "DS_ACCELERATOR": "it follows from runtimes.device",
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        _RANKS,
    ),
}
"""That a cluster profile sets neither in `env` nor in `role_env`: without effect, or other for each rank."""

SHARED_VARIABLES: Mapping[str, str] = {
    "GLOO_SOCKET_IFNAME": _INTERFACE,
    "NCCL_SOCKET_IFNAME": _INTERFACE,
    "VLLM_HOST_IP": _INTERFACE,
    "VLLM_RPC_BASE_PATH": "vLLM's sockets lie in a private directory: set cluster.scratch to the folder it is made in",
    "VLLM_SERVER_DEV_MODE": "vLLM for the policy needs it on, and a judge's off: take it away",
    "VLLM_NO_USAGE_STATS": _USAGE,
    "RAY_USAGE_STATS_ENABLED": _USAGE,
    **dict.fromkeys(
        ("RAY_TMPDIR", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"),
        _RAY,
    ),
    "TOKENIZERS_PARALLELISM": "the trainers do without it: set it in cluster.role_env for the roles that you mean",
}
"""That only `role_env` can set: what hpc-gym gives the processes of a role wins over `env`."""

DEVICE_VARIABLES: Mapping[str, Mapping[str, str]] = {
    "cpu": {
        "OMP_NUM_THREADS": "vLLM and each rank have one thread: set it in cluster.role_env for the roles that you mean",
        "VLLM_CPU_OMP_THREADS_BIND": "set it in cluster.role_env for rollout or judge",
    },
    "cuda": {
        "CUDA_VISIBLE_DEVICES": "each vLLM is given GPUs of its own: set gpus_per_node to how many of a node are used, "
        "or cluster.role_env.train to which of them train",
    },
}
"""As SHARED_VARIABLES, by `runtimes.device`."""

_OURS = "HPC_GYM_"
_OUR_REASON = f"{_OURS}... is how hpc-gym's own processes find one another: take it away"


def variable_problems(experiment: Experiment) -> Iterable[Problem]:
    """Variables of the cluster profile that would not reach the processes which they are meant for."""
    cluster = experiment.cluster
    shared = {**VARIABLES, **SHARED_VARIABLES, **DEVICE_VARIABLES[experiment.runtimes.device]}
    sections: list[tuple[KeyPath, Iterable[str], Mapping[str, str]]] = [(("cluster", "env"), cluster.env, shared)]
    sections += [(("cluster", "role_env", role), own, VARIABLES) for role, own in cluster.role_env.items()]
    for path, names, owned in sections:
        for name in names:
            if reason := _OUR_REASON if name.startswith(_OURS) else owned.get(name):
                yield Problem((*path, name), f"hpc-gym owns this variable: {reason}.")
