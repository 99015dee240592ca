"""The typed experiment: every key a user may write. Unknown keys are refused everywhere, types are strict.

Defaults that someone might tune stand with their reasons in `configs/base.yaml`; here stand only those of list
elements and "absent means none". The options of vLLM, TRL and DeepSpeed are open sections here: `hpc_gym.plan.options`
checks them against what the locked runtimes accept.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_Text = Annotated[str, Field(min_length=1)]
_MANY = 10**9
"""More than anybody means: what is beyond it was mistyped, and would be counted through before anything fails."""
_Count = Annotated[int, Field(ge=0, le=_MANY)]
_Positive = Annotated[int, Field(ge=1, le=_MANY)]
_MOST_NODES = 10_000
"""Per role: the largest clusters have about so many."""
_MOST_PER_NODE = 1024
_LONGEST_SCRATCH = 24
"""Bytes. The path of a Unix socket is at most 108, and Ray's go on for some 80 below it. `node.context` has it too."""
_Seconds = Annotated[float, Field(gt=0)]
_Temperature = Annotated[float, Field(ge=0, le=2)]
_TopP = Annotated[float, Field(gt=0, le=1)]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


class Section(BaseModel):
    """A part of the experiment: strict types, unknown keys refused, frozen."""

    # Built once, as part of Experiment, and not section by section too: that halves the time of this module's import.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True, allow_inf_nan=False)


class Model(Section):
    """The model that is trained."""

    path: _Text
    """Folder, or name on the hub (then it must be in the cache: a job never downloads)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of vLLM and of the trainer alike."""


class Nodes(Section):
    """Nodes per role."""

    rollout: Annotated[int, Field(ge=1, le=_MOST_NODES)]
    train: Annotated[int, Field(ge=1, le=_MOST_NODES)]
    judge: Annotated[int, Field(ge=0, le=_MOST_NODES)] = 0
    """Where `judge.placement` is nodes."""
    environment: Annotated[int, Field(ge=0, le=_MOST_NODES)] = 0
    """For NeMo Gym alone, without GPUs; 0: it runs on the rollout nodes."""


class Environment(Section):
    """A NeMo Gym environment."""

    config_paths: Annotated[list[_Text], Field(min_length=1)]
    """Configurations of NeMo Gym: a path inside nemo-gym (`environments/NAME/config.yaml`), or a file of yours."""
    agent: _Text | None = None
    """The `responses_api_agents` instance that rollouts go to; null: the only one in `config_paths`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """More NeMo Gym configuration, merged over `config_paths`."""
    timeout_s: _Seconds = 900.0
    """Deadline of one rollout, seconds."""
    max_attempts: _Positive = 2
    """How often a rollout that failed for a reason of infrastructure is tried in all."""


class Rows(Section):
    """A JSONL file of rows for one environment."""

    environment: _Text
    path: _Text
    """A file (relative to the YAML file that names it), or `nemo_gym:PATH` for one inside nemo-gym."""


class WeightedRows(Rows):
    """Rows of the training mixture."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share relative to the other sources."""


class Data(Section):
    """What is trained on and what is held out."""

    train: Annotated[list[WeightedRows], Field(min_length=1)]
    eval: list[Rows]


class Rollouts(Section):
    """How the policy samples, and how many rollouts run."""

    temperature: _Temperature
    top_p: _TopP
    max_output_tokens: _Positive
    """Tokens of one turn."""
    tool_choice: Literal["auto", "required", "none"] | None
    max_concurrent: _Positive
    """Rollouts in flight per rollout node."""
    replicas: Annotated[int, Field(ge=1, le=_MOST_PER_NODE)] | None
    """vLLM servers per rollout node; null: as many as its GPUs hold, or one without GPUs."""


class Evaluation(Section):
    """Evaluation on `data.eval`. null at `at_start`, `at_end`: when there are such rows."""

    at_start: bool | None
    at_end: bool | None
    every: _Count
    """Steps between evaluations; 0: only at start and end."""
    num_rollouts: _Positive
    """Rollouts per row."""
    temperature: _Temperature
    top_p: _TopP
    max_output_tokens: _Positive | None
    """null: as in training."""


class Checkpoints(Section):
    """Checkpoints of the training state."""

    every: _Count
    """Steps between checkpoints; 0: none but at the end."""
    keep: _Positive
    """How many of the newest are kept."""


class Weights(Section):
    """How trained weights reach vLLM."""

    transfer: Literal["gloo", "nccl", "filesystem", "adapter"] | None
    """null: nccl on GPUs, gloo on CPUs."""


class Wandb(Section):
    """Weights & Biases."""

    project: _Text
    entity: _Text | None = None
    name: _Text | None = None
    """null: the name of the run."""
    group: _Text | None = None
    tags: list[_Text] = Field(default_factory=list)
    mode: Literal["online", "offline"] = "offline"
    """offline: compute nodes often reach no internet; `wandb sync` uploads the files of the run afterwards."""


class Tracking(Section):
    """Where metrics go besides the run directory."""

    wandb: Wandb | None


class Judge(Section):
    """A frozen model that verifies: `model`, which the job serves, or `url`, an address outside."""

    model: _Text | None = None
    """Folder, or name on the hub (then it must be in the cache: a job never downloads)."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Options of its `vllm serve` by their own names."""
    placement: Literal["rollout", "nodes"] = "rollout"
    """rollout: one on each rollout node, on its last GPUs; nodes: one on each of `nodes.judge` nodes, on its first."""
    url: _Text | None = None
    """An OpenAI-compatible address (`https://HOST/v1`)."""
    model_name: _Text | None = None
    """What the model is called there."""
    api_key_env: _Text | None = None
    """Environment variable that holds the key of that address; it travels with `secrets`."""


class Runtimes(Section):
    """Where the roles' programs run: names that `hpc-gym runtimes list` prints."""

    device: Literal["cpu", "cuda"]
    inference: _Text | None
    """null: the one for `device`."""
    gym: _Text
    train: _Text | None
    """null: the one for `device`."""


class Container(Section):
    """How the runtimes are entered on this cluster."""

    kind: Literal["venv", "modules", "apptainer", "pyxis"]
    modules: list[_Text]
    """Environment modules loaded first."""
    images: dict[Literal["inference", "gym", "train"], _Text]
    """Container images, where `kind` is a container engine: files (relative to the YAML file that names them), or a
    registry's addresses (`docker://NAME`).
    """
    options: list[_Text]
    """More arguments of the container engine."""


Directive = str | int | float | bool | None


class Slurm(Section):
    """sbatch's long options by their own names; those under a role hold for its nodes only. null takes one away."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Directive]

    rollout: dict[str, Directive] = Field(default_factory=dict)
    train: dict[str, Directive] = Field(default_factory=dict)
    judge: dict[str, Directive] = Field(default_factory=dict)
    environment: dict[str, Directive] = Field(default_factory=dict)

    @property
    def options(self) -> dict[str, Directive]:
        """The directives for all nodes."""
        return dict(self.__pydantic_extra__ or {})


class Cluster(Section):
    """Where jobs run."""

    kind: Literal["local", "slurm"]
    runs_dir: _Text
    """On storage that all nodes share; relative to the working directory of the submit."""
    slurm: Slurm
    srun: dict[str, Directive]
    """Options of the one `srun` that starts a supervisor on every node, by their own names."""
    chain: _Count
    """Jobs submitted ahead, each to go on where the one before stopped, for sites that refuse `scontrol requeue`."""
    setup: list[_Text]
    """Shell lines that the job script runs first; what they export reaches all nodes."""
    env: dict[str, str]
    """Environment variables of every process; those that hpc-gym sets itself are refused (`plan.owned`)."""
    role_env: dict[Literal["rollout", "train", "judge", "environment"], dict[str, str]]
    """More of them for the processes of one role; these win over hpc-gym's own."""
    network_interface: _Text | None
    scratch: _Text | None
    """Folder on the node for private files; its path must be short, for Unix sockets lie in it."""
    runtime: Container

    @field_validator("scratch")
    @classmethod
    def _has_room_for_sockets(cls, scratch: str | None) -> str | None:
        if scratch is None:
            return None
        if not scratch.startswith("/"):
            raise ValueError("must be an absolute path: it is a folder on each node.")
        if (length := len(os.fsencode(scratch))) > _LONGEST_SCRATCH:
            raise ValueError(
                f"is {length} bytes long, and {_LONGEST_SCRATCH} are allowed: Unix sockets lie deep inside it, and "
                "their paths are at most 108 bytes. Name a folder with a shorter path, or set it to null."
            )
        return scratch


class Supervision(Section):
    """Deadlines, in seconds, and restarts."""

    heartbeat_s: _Seconds
    node_silent_s: _Seconds
    stop_within_s: _Seconds
    checkpoint_grace_s: _Seconds
    time_limit_margin_s: _Seconds
    vllm_ready_s: _Seconds
    gym_ready_s: _Seconds
    alive_s: Annotated[float, Field(ge=0)]
    """A service that answers no probe for so long counts as hung; 0: never."""
    trainer_alive_s: Annotated[float, Field(ge=0)]
    """A training rank that shows no sign of life for so long counts as hung; 0: never."""
    stall_factor: Annotated[float, Field(ge=0)]
    """Training counts as stalled after so many medians of a step without a step or a rollout; 0: never."""
    stall_at_least_s: _Seconds
    """But not sooner than this: checkpoints are no steps. Before the third step it is this alone."""
    on_stall: Literal["stop", "requeue"]
    restarts: _Count
    """How often a service (vLLM, NeMo Gym, the rollout server) is started again in place."""


class Experiment(Section):
    """An experiment: one YAML file with what it inherits."""

    name: _Text
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """numpy takes no larger one."""
    vars: dict[str, Any]
    """Values of your own, for `${vars.NAME}`."""
    model: Model
    nodes: Nodes
    gpus_per_node: Annotated[int, Field(ge=0, le=_MOST_PER_NODE)]
    ranks_per_node: Annotated[int, Field(ge=1, le=_MOST_PER_NODE)] | None
    """Training processes per training node; null: one per GPU, or one without GPUs."""
    environments: Annotated[dict[str, Environment], Field(min_length=1)]
    data: Data
    vllm: dict[str, Any]
    """Options of `vllm serve` by their own names (`max_model_len`)."""
    rollouts: Rollouts
    grpo: dict[str, Any]
    """Fields of TRL's GRPOConfig by their own names."""
    max_staleness: _Count
    on_policy_tolerance: Annotated[float, Field(ge=0)]
    deepspeed: dict[str, Any]
    """`zero_stage`, and keys of a DeepSpeed configuration by their own names."""
    evaluation: Evaluation
    checkpoints: Checkpoints
    weights: Weights
    tracking: Tracking
    judge: Judge | None
    cluster: Cluster
    supervision: Supervision
    runtimes: Runtimes
    secrets: list[_Text]
    """Names of environment variables that travel in the 0600 secrets file of an attempt."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ValueError(
                "must be usable as a folder's name: letters, digits, '.', '_' and '-', at most 100, "
                "starting with a letter or digit."
            )
        if name == "latest" or name.isdigit():
            raise ValueError("would be taken for another run: 'latest' is the newest one, and a number is a job's id.")
        return name

    @field_validator("environments")
    @classmethod
    def _environment_names(cls, environments: dict[str, Environment]) -> dict[str, Environment]:
        for name in environments:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(f"the name '{name}' must be letters, digits, '_', '.' and '-'.")
        return environments
