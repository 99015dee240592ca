"""The Plan: an experiment resolved, validated and frozen. It is the only thing a job needs.

Everything here is a plain value: no cluster is asked, no torch is imported, and the same inputs give the same bytes
(`Plan.to_json`). What exists only once a job runs (ports, node addresses, the attempt's number and token) is written
as a placeholder `{kind:name}` and filled in by the supervisor of the node, see `hpc_gym.node`.

Placeholders allowed in `Process.argv`, `Process.env`, `ConfigFile.text` and `Link`:

=====================  ===========================================================================================
`{run_dir}`            the run directory
`{attempt}`            number of this attempt, from 1
`{attempt_dir}`        `RUN_DIR/attempts/K`
`{log_dir}`            `RUN_DIR/attempts/K/logs`
`{secrets}`            path of the attempt's 0600 secrets file (JSON, see `hpc_gym.protocol.secrets`)
`{node}`               name of this node in logs
`{address}`            address of this node that the other nodes reach it by
`{interface}`          network interface that carries `{address}` ("lo" in a local job)
`{private_dir}`        a 0700 directory of this node and attempt, removed at the end; Unix sockets live there
`{port:NAME}`          a TCP port of this node, chosen by its supervisor for `Process.ports`; the first one of a block
`{port:NAME+99}`       the hundredth port of the block `NAME*100`
`{fd:NAME}`            the inherited, already listening socket of `Process.listen`
`{endpoint:NAME}`      `host:port` of an endpoint that some node publishes (waits until it is known)
`{host:NAME}`          the host part of that endpoint
`{portof:NAME}`        the port part of that endpoint
`{endpoints:PREFIX}`   all published endpoints `PREFIX-0`, `PREFIX-1`, ... joined by commas
=====================  ===========================================================================================
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RoleName = Literal["rollout", "train", "judge", "environment"]


@dataclass(frozen=True)
class ConfigFile:
    """A file that the supervisor writes before it starts a process; `path` and `text` may hold placeholders."""

    path: str
    text: str


@dataclass(frozen=True)
class Link:
    """A symbolic link that the supervisor makes before it starts a process; both ends may hold placeholders."""

    path: str
    target: str


@dataclass(frozen=True)
class Probe:
    """How readiness of a process is asked, with the identity checked: an answer from somebody else's port is no answer.

    `http`: `GET path` on the Unix socket `target` (in the private directory, so nobody else can own it) answers 200.
    `gym`: `target` is the port of NeMo Gym's head server; every server it lists must belong to this process's group
    and answer `GET /`. `notify`: the process says `READY=1` on `NOTIFY_SOCKET` (sd_notify protocol).
    """

    kind: Literal["http", "gym", "notify"]
    target: str = ""
    path: str = ""


@dataclass(frozen=True)
class Process:
    """One process (group) of a node.

    `kind`: a `task` ends by itself, and the job is done when every task has exited with 0; a `service` must live as
    long as the job does. `restarts`: how often it is started again in place after it died. `ready_within_s`: deadline
    from start to ready; 0: none. `alive_within_s`: an http or gym probe that
    has not answered for so long, or a notify process that sent no `WATCHDOG=1` for so long, counts as hung; 0: never.
    """

    name: str
    role: RoleName
    kind: Literal["task", "service"]
    runtime: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    files: tuple[ConfigFile, ...] = ()
    links: tuple[Link, ...] = ()
    ports: tuple[str, ...] = ()
    """Names of single ports, published as endpoints of the same name; `NAME*100` reserves 100 ports in a row,
    unpublished.
    """
    listen: tuple[str, ...] = ()
    """Names of endpoints whose TCP socket the supervisor binds, publishes at once and hands over as `{fd:NAME}`."""
    ready: Probe | None = None
    ready_within_s: float = 0.0
    alive_within_s: float = 0.0
    restarts: int = 0
    together: str = ""
    """Processes with the same word here, on whichever nodes, can only live together: where one is started again, all
    are.
    """
    stop_grace_s: float = 5.0
    """Seconds between SIGTERM and SIGKILL to the process group."""


@dataclass(frozen=True)
class Node:
    """One node of the job. `rank` counts over all components; the supervisor of rank 0 is the coordinator."""

    rank: int
    role: RoleName
    index: int
    """Position among the nodes of this role, from 0."""
    component: int
    """Component of a heterogeneous job; 0 in a plain job."""
    processes: tuple[Process, ...]

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


@dataclass(frozen=True)
class Runtime:
    """Where programs run. `kind` venv: `root/bin` is first on PATH and `python` is its interpreter."""

    name: str
    kind: Literal["venv", "modules", "apptainer", "pyxis"]
    root: str
    """Folder of the venv, or the image."""
    python: str
    lock: str = ""
    """Digest of the lock it is built from, for the manifest."""
    modules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """Extra arguments of the container engine."""

    @property
    def folder(self) -> str:
        """Its folder as its own programs see it; an image has it where `containers/` put it."""
        if self.kind in ("venv", "modules"):
            return self.root
        return f"/opt/hpc-gym/{self.name.partition('-')[0]}"


@dataclass(frozen=True)
class Environment:
    """A NeMo Gym environment. `agent` is the name of the `responses_api_agents` instance that `/run` is sent to."""

    name: str
    agent: str
    config_paths: tuple[str, ...]
    timeout_s: float
    """Deadline of one rollout, seconds."""
    max_attempts: int
    """How often a rollout that failed for a reason of infrastructure is tried in all."""


@dataclass(frozen=True)
class DataSource:
    """One JSONL file of rows for one environment. `weight` is relative to the other sources of the mixture."""

    environment: str
    path: str
    weight: float
    rows: int


@dataclass(frozen=True)
class Sampling:
    """How the policy samples, in NeMo Gym's (Responses API) words. It overrides what a dataset row says."""

    temperature: float
    top_p: float
    max_output_tokens: int
    """Tokens of one turn."""
    tool_choice: str | None = None


@dataclass(frozen=True)
class Judge:
    """A frozen model that verifies."""

    model_name: str
    timeout_s: float
    """How long it may take for one answer."""
    url: str | None = None
    """OpenAI-compatible address outside; None: a vLLM of the job, on `{private_dir}/judge.sock` of its node."""
    api_key_env: str | None = None
    """Name of the secret that opens the address."""
    model: str | None = None
    """Folder or hub name of what the vLLM of the job serves."""


@dataclass(frozen=True)
class RolloutSettings:
    """What a rollout server needs."""

    model_name: str
    """Name under which vLLM serves the policy."""
    max_model_len: int
    max_concurrent: int
    """Rollouts in flight per rollout server; the rest wait in its queue."""
    replicas: int
    """vLLM replicas per rollout node; replica k listens on `{private_dir}/vllm-k.sock`."""
    judge: Judge | None = None


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out rows: all rows of `sources`, in order, `num_rollouts` each."""

    sources: tuple[DataSource, ...]
    at_start: bool
    at_end: bool
    every: int
    """Steps between evaluations; 0: only at start and end."""
    sampling: Sampling
    num_rollouts: int
    """Rollouts per row."""


@dataclass(frozen=True)
class Training:
    """What the training ranks need. `grpo` holds GRPOConfig fields, `deepspeed` a DeepSpeed config, by their own
    names.
    """

    method: Literal["grpo"]
    model: str
    """Folder or hub name of the model the run starts from."""
    grpo: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    prompts_per_step: int
    world_size: int
    max_staleness: int
    sources: tuple[DataSource, ...]
    sampling: Sampling
    evaluation: Evaluation
    weight_transfer: Literal["gloo", "nccl", "filesystem", "adapter"]
    """How weights travel. Whatever it says, vLLM is started with
    `--worker-extension-cls hpc_gym.weights.worker.WorkerExtension --weight-transfer-config
    '{"backend": "hpc_gym"}'`: the sender names the transport when it makes its group.
    """
    checkpoint_every: int
    """Steps between checkpoints; 0: none but at the end."""
    checkpoints_kept: int
    """How many of the newest are kept, at least 1."""
    wandb: Mapping[str, Any] | None
    """`project`, `entity`, `mode`, `run_id`, `name`; None: no W&B."""
    on_policy_tolerance: float
    """Largest mean |log p(trainer) - log p(vLLM)| of a step; above it the run stops. 0: only logged."""


@dataclass(frozen=True)
class Launch:
    """How the job is launched. `options` are the directives of the scheduler, by their own names (`partition`, ...)."""

    kind: Literal["local", "slurm"]
    options: Mapping[str, Any] = field(default_factory=dict)
    components: tuple[Mapping[str, Any], ...] = ()
    """Per component of the allocation: `nodes`, and directives of its own (partition, constraint, gres...)."""
    srun: Mapping[str, Any] = field(default_factory=dict)
    """More options of the one srun."""
    setup: tuple[str, ...] = ()
    """Shell lines of the cluster profile, run first by the job script; what they export reaches all nodes."""
    chain: int = 0
    """Jobs that are submitted with this one, each to go on where the one before stopped; 0: the job is requeued."""
    network_interface: str | None = None
    scratch: str | None = None
    """Node-local directory for private files; None: the node's temporary directory."""


@dataclass(frozen=True)
class Supervision:
    """Deadlines, in seconds."""

    heartbeat_s: float = 2.0
    node_silent_s: float = 10.0
    stop_within_s: float = 10.0
    """From the first cause to every node released."""
    checkpoint_grace_s: float = 120.0
    """How long a checkpoint that is being written may delay a stop."""
    time_limit_margin_s: float = 120.0
    stall_factor: float = 0.0
    """Training counts as stalled after so many medians of a step without a step or a rollout; 0: never."""
    stall_at_least_s: float = 900.0
    """But not sooner than this: checkpoints are no steps. Before the third step it is this alone."""
    on_stall: Literal["stop", "requeue"] = "stop"


@dataclass(frozen=True)
class Plan:
    """See the module. `nodes` are in rank order; `env` is set for every process of the job."""

    name: str
    run_dir: str
    seed: int
    python: str
    """Interpreter of the base runtime: supervisors, and the servers of hpc-gym."""
    nodes: tuple[Node, ...]
    runtimes: Mapping[str, Runtime]
    environments: tuple[Environment, ...]
    rollout: RolloutSettings
    training: Training
    launch: Launch
    supervision: Supervision
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    """Names of environment variables that travel in the secrets file (WANDB_API_KEY, HF_TOKEN)."""
    version: int = 1

    def to_json(self) -> str:
        """The Plan as JSON text with sorted keys: equal Plans give equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The Plan that `to_json` wrote. Raises ValueError for a version this hpc-gym does not know."""
        data = json.loads(text)
        if data.get("version") != 1:
            raise ValueError(f"this plan.json has version {data.get('version')!r}; this hpc-gym reads version 1")
        plan: Plan = _build(cls, data)
        return plan

    @classmethod
    def read(cls, run_dir: str | Path) -> Plan:
        """The Plan of a run directory."""
        return cls.from_json((Path(run_dir) / "plan.json").read_text())


def _build(kind: Any, value: Any) -> Any:
    """`value`, as JSON gave it, turned into the annotated type `kind` (dataclasses, tuples and optionals of them)."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    if origin is collections.abc.Mapping:
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _build(inner, value)
    return value
