"""The HTTP interface of a rollout server: what travels, as msgspec structs.

===========================  ==============================  ================================================
request                      body                            answer
===========================  ==============================  ================================================
`GET /health`                                                `Health`, JSON, at once whatever still loads
`POST /rollouts`             `RolloutBatch`, msgpack         a stream of frames (`protocol.codec`) in order of
                                                             completion; frames without trajectories are signs of
                                                             life; it ends when every row has been answered
`POST /weights/init`         `WeightsInit`, JSON             `{}` when every replica has joined the sender
`POST /weights/update`       `WeightsUpdate`, JSON           `{}` when every replica generates with the new weights
`POST /abort`                `Abort`, JSON                   `{"dropped": n}`
===========================  ==============================  ================================================

Every request carries `Authorization: Bearer TOKEN`. An error is answered as `Problem`, JSON, with status 4xx or 5xx.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the policy samples; what is set overrides the row's `responses_create_params`, what is None does not."""

    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    """Tokens of one turn."""
    tool_choice: str | None = None


class RolloutRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rollout that is wanted: a dataset row, as the bytes of its JSON line, in an environment of the Plan.

    Rows of one `group` (a GRPO group: the same prompt) go to the same rollout server and replica, where it is cached.
    """

    environment: str
    row: bytes
    group: int
    sampling: Sampling


class RolloutBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows to roll out. `indices[i]` is the `Trajectory.index` that row i is answered with."""

    id: str
    rows: list[RolloutRequest]
    indices: list[int]
    weight_version: int = 0
    """Replicas with older weights are not used; a row that finds no replica in time fails with `weights_stale`."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One vLLM of the node. It takes rollouts when it is `ready`."""

    state: Literal["loading", "ready", "stale", "updating"]
    """`stale`: it was restarted and lacks weights that it had been given."""
    incarnation: str
    """Differs after a restart; empty while it loads."""
    weight_version: int
    """Weights it generates with; 0 are those it loaded at its start."""
    world_size: int
    """Its workers: so many ranks it takes in a weight transfer group."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """State of a rollout server and of what it stands in front of."""

    ready: bool
    """vLLM, NeMo Gym and the judge are there: rollouts can run (perhaps after a weight update)."""
    nonce: str
    """Differs after a restart of the rollout server."""
    status: str
    """One line for people: `vLLM 0/1 ready, NeMo Gym 3/5 servers ready`."""
    replicas: list[Replica]
    gym_ready: int
    gym_total: int
    """Servers of NeMo Gym; 0 while its head server does not answer."""
    running: int
    queued: int
    judged: int = 0
    """Requests that the judge has answered."""
    hopeless: str = ""
    """Why there is nothing to wait for: what somebody must change first."""


class WeightsInit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Join the sender's transfer group. One entry per replica, in order; vLLM gets `init_info` as it is."""

    incarnations: list[str]
    """As `Health` said: another incarnation is refused, it would take a wrong rank."""
    init_info: list[msgspec.Raw]


class WeightsUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Receive weights `version`. One `update_info` per replica, as for `WeightsInit`."""

    version: int
    incarnations: list[str]
    update_info: list[msgspec.Raw]


class Abort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Drop the rollouts of one batch, or of all batches when `batch` is None. They come back failed with `aborted`."""

    batch: str | None = None


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request was refused or failed: a sentence."""

    error: str
