"""The processes of each kind of node, as data. What exists only once a job runs stands as a placeholder, see
`plan.plan`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpc_gym.config.schema import Experiment
from hpc_gym.plan.plan import Probe, Process
from hpc_gym.plan.spread import gpus_of, gpus_per_replica, master, node_flags, nodes_of
from hpc_gym.runtimes.options import table

MODEL_NAME = "policy"
"""What vLLM and NeMo Gym call the model that is trained."""
BASE = "base"
"""Name of the runtime that hpc-gym itself is installed in."""

_LOOPBACK = "127.0.0.1"
# What a laptop can spare; vLLM would take most of the memory that is free.
_CPU_KV_CACHE_BYTES = 1 << 30
# One worker needs no process of its own. vLLM 0.32 turns the short name "uni" back into "mp" on CPU (platforms/cpu.py),
# and "mp" lets engine and worker spin for a second after every message (shm_broadcast.py), on cores that others need
# here. Measured on two cores with the demo's model: ready after 16 s instead of 34 s.
_CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True)
class Names:
    """Names of the runtimes by what runs in them."""

    inference: str
    gym: str
    train: str


def rollout_processes(
    experiment: Experiment,
    names: Names,
    index: int,
    model: str,
    replicas: int,
    gym: Sequence[Process],
    flags: Sequence[str],
) -> tuple[Process, ...]:
    """vLLM replicas, NeMo Gym where it is here, and the rollout server of rollout node `index`. All start at once.

    `flags`: of the rollout server, where it finds NeMo Gym and the judge. Of a vLLM over several nodes the first one
    has all of this, the others a share of vLLM.
    """
    group, part = divmod(index, nodes_of(experiment.vllm))
    if part:
        return (_vllm(experiment, names, 0, model, group, part),)
    return (
        *(_vllm(experiment, names, replica, model, group) for replica in range(replicas)),
        *gym,
        _rollout_server(experiment, group, flags),
    )


def train_processes(experiment: Experiment, names: Names, index: int, ranks: int) -> tuple[Process, ...]:
    """The ranks of training node `index`, `ranks` per node."""
    return tuple(
        Process(
            name=f"rank-{index * ranks + local}",
            role="train",
            kind="task",
            runtime=names.train,
            argv=("{python}", "-m", "hpc_gym.training.grpo", "--run-dir", "{run_dir}"),
            env=_trainer_env(experiment, index * ranks + local, local, ranks),
            ports=("train-master",) if index == local == 0 else (),
            # It is ready when the rollout servers are, which have deadlines of their own.
            ready=Probe(kind="notify"),
            alive_within_s=experiment.supervision.trainer_alive_s,
        )
        for local in range(ranks)
    )


def vllm_flags(options: Mapping[str, Any]) -> list[str]:
    """`vllm serve` options as arguments, in order of name: `max_model_len: 5` becomes `--max-model-len 5`."""
    flags: list[str] = []
    options_of_vllm = table("vllm")
    for name, value in sorted(options.items()):
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            # A flag that cannot be negated is left out to say false.
            flags += [f"--{flag}"] if value else [f"--no-{flag}"] if options_of_vllm[name].negatable else []
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            flags += [f"--{flag}", json.dumps(value, sort_keys=True)]
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def vllm_options(experiment: Experiment) -> dict[str, Any]:
    """The user's vLLM options with what follows from the rest of the experiment."""
    options: dict[str, Any] = {
        "dtype": experiment.model.dtype,
        "seed": experiment.seed,
        # Sampling defaults of a model folder must not change what the trainer believes was sampled.
        "generation_config": "vllm",
        # Log-probabilities after temperature: those of the distribution that tokens were drawn from.
        "logprobs_mode": "processed_logprobs",
        # Three lines a turn say nothing that the rollout server does not know better.
        "disable_uvicorn_access_log": True,
        **experiment.vllm,
    }
    return with_defaults(experiment, options)


def with_defaults(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of any vLLM with what the device and other options ask for."""
    options = dict(options)
    if "tool_call_parser" in options:
        options.setdefault("enable_auto_tool_choice", True)
    if experiment.runtimes.device == "cpu":
        options.setdefault("kv_cache_memory_bytes", _CPU_KV_CACHE_BYTES)
        if gpus_of(options) == 1:
            options.setdefault("distributed_executor_backend", _CPU_EXECUTOR)
    return options


def gpus_of_judge(experiment: Experiment) -> int:
    """GPUs of each rollout node that the judge takes; none where it has nodes of its own."""
    judge = experiment.judge
    return gpus_of(judge.vllm) if judge is not None and judge.model and judge.placement == "rollout" else 0


def _vllm(experiment: Experiment, names: Names, replica: int, model: str, group: int, part: int = 0) -> Process:
    """One vLLM of a rollout node, or the share in it of the `part`-th node of its group."""
    socket = f"vllm-{replica}.sock"
    size, several = gpus_per_replica(experiment), nodes_of(experiment.vllm) > 1
    env = {
        **vllm_env(experiment, range(replica * size, (replica + 1) * size), "{address}" if several else _LOOPBACK),
        # The control endpoints for weight updates; nobody but us can reach the socket in the private directory.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    argv = [
        *("vllm", "serve", model, "--served-model-name", MODEL_NAME),
        *(("--uds", f"{{private_dir}}/{socket}") if part == 0 else ()),
        "--enable-scale-out",
        *("--worker-extension-cls", "hpc_gym.weights.worker.WorkerExtension"),
        *("--weight-transfer-config", json.dumps({"backend": "hpc_gym"})),
        *vllm_flags(vllm_options(experiment)),
        *(node_flags(group, part) if several else ()),
    ]
    process = Process(
        name=f"vllm-{replica}",
        role="rollout",
        kind="service",
        runtime=names.inference,
        argv=tuple(argv),
        env=role_env(experiment, "rollout", env),
        ports=(master(group),) if several and part == 0 else (),
        together=f"vllm-{group}" if several else "",
        # Asked of its engine: `/health` is content as long as the engine's process lives, however it hangs.
        ready=Probe(kind="http", target=socket, path="/is_sleeping"),
        ready_within_s=experiment.supervision.vllm_ready_s,
        alive_within_s=experiment.supervision.alive_s,
        restarts=experiment.supervision.restarts,
        # It has nothing to save, and takes long to end while it loads; Slurm gives a job that it ends KillWait seconds.
        stop_grace_s=2.0,
    )
    if part == 0:
        return process
    # Without an API server there is nobody to ask: the first node is ready when all are. It has nothing to save, and
    # by itself waits 5 s for a worker that waits for the first node.
    return replace(process, name="vllm-headless", ready=None, alive_within_s=0.0, stop_grace_s=1.0)


def vllm_env(experiment: Experiment, gpus: range, address: str = _LOOPBACK) -> dict[str, str]:
    """The environment of any vLLM, which has these GPUs of its node and listens on `address` for its own parts."""
    env = {
        **_network_env(),
        # Of its many groups, those among its own processes need nothing of the network.
        **({"GLOO_SOCKET_IFNAME": "lo", "HPC_GYM_INTERFACE": "{interface}"} if address == _LOOPBACK else {}),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": address,
        "VLLM_RPC_BASE_PATH": "{private_dir}",
    }
    if experiment.runtimes.device == "cpu":
        # vLLM's own binding leaves a core to its API server and takes the rest, whatever else runs there. OpenMP
        # threads spin while they wait for each other: more than one pays for large models (`cluster.role_env.rollout`).
        return env | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return env | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}


def _rollout_server(experiment: Experiment, index: int, flags: Sequence[str]) -> Process:
    endpoint = f"rollout-{index}"
    argv = (
        *("{python}", "-m", "hpc_gym.rollout.server", "--run-dir", "{run_dir}", "--node", "{node}"),
        *("--fd", f"{{fd:{endpoint}}}", *flags, "--private-dir", "{private_dir}", "--secrets", "{secrets}"),
    )
    return Process(
        name="rollout-server",
        role="rollout",
        kind="service",
        runtime=BASE,
        argv=argv,
        env=role_env(experiment, "rollout", {}),
        ports=("policy",) if "{port:policy}" in flags else (),
        listen=(endpoint,),
        ready=Probe(kind="notify"),
        # It is ready when vLLM and NeMo Gym are, so it may take as long as the slower one.
        ready_within_s=max(experiment.supervision.vllm_ready_s, experiment.supervision.gym_ready_s),
        alive_within_s=experiment.supervision.alive_s,
        restarts=experiment.supervision.restarts,
    )


def _trainer_env(experiment: Experiment, rank: int, local: int, ranks: int) -> dict[str, str]:
    env = {
        **_network_env(),
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(experiment.nodes.train * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "{host:train-master}",
        "MASTER_PORT": "{portof:train-master}",
        "HPC_GYM_ROLLOUT_SERVERS": "{endpoints:rollout}",
        "HPC_GYM_SECRETS": "{secrets}",
        "HPC_GYM_ATTEMPT": "{attempt}",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": experiment.tracking.wandb.mode if experiment.tracking.wandb else "disabled",
        "WANDB_DIR": "{run_dir}",
    }
    if experiment.runtimes.device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return role_env(experiment, "train", env)


def _network_env() -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": "{interface}", "NCCL_SOCKET_IFNAME": "{interface}"}


def role_env(experiment: Experiment, role: Any, env: Mapping[str, str]) -> dict[str, str]:
    """`env` with what the cluster's profile says for the role, which wins."""
    return {**env, **experiment.cluster.role_env.get(role, {})}
