"""New weights for the replicas of this node: the trainers' only way to vLLM's control endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Sequence

import msgspec

from hpc_gym.protocol.messages import WeightsInit, WeightsUpdate
from hpc_gym.rollout.replicas import UNKNOWN_WEIGHTS, Replica, Replicas
from hpc_gym.rollout.vllm import VllmError, VllmUnreachable

log = logging.getLogger(__name__)

STEP_S = 60.0
"""Deadline of the quick steps: pause, start, resume."""
TRANSFER_S = 1800.0
"""Deadline of what waits for the sender; the sender's own deadlines are shorter."""


class WeightsRefused(ValueError):
    """The request does not fit the replicas that are there."""


class WeightsFailed(RuntimeError):
    """A replica could not take the weights; the text names it."""


class Weights:
    """Carries out transfers, one at a time. All replicas take each step together, since the sender broadcasts to
    all.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._busy = asyncio.Lock()

    async def init(self, message: WeightsInit) -> None:
        """Every replica joins the sender's transfer group. Raises WeightsRefused or WeightsFailed."""
        async with self._busy:
            pairs = self._match(message.incarnations, message.init_info)
            # What a rollout server that died in the middle of an update has left.
            abandon = msgspec.Raw(b'"abandon_weight_update"')
            await _all(self._post(replica, "/collective_rpc", method=abandon) for replica, _ in pairs)
            await _all(self._post(replica, "/init_weight_transfer_engine", init_info=info) for replica, info in pairs)
            log.info("joined the sender's group: %s", ", ".join(replica.name for replica, _ in pairs))

    async def update(self, message: WeightsUpdate) -> None:
        """Every replica receives the weights and goes on with them, also in generations under way.

        Generation is paused meanwhile, and keys and values computed from older weights are dropped. Raises
        WeightsRefused or WeightsFailed; after a failure replicas generate again, but get no rollouts until an update
        has succeeded.
        """
        async with self._busy:
            pairs = self._match(message.incarnations, message.update_info)
            replicas = [replica for replica, _ in pairs]
            start = asyncio.get_running_loop().time()
            for replica in replicas:
                replica.updating = True
            try:
                await _all(self._post(replica, "/pause?mode=keep") for replica in replicas)
                for replica in replicas:
                    # Until it is known that all of the new weights arrived.
                    replica.weight_version = UNKNOWN_WEIGHTS
                # Should this server die now, the next one must not take the old label for true.
                label = msgspec.Raw(b'"updating"')
                await _all(self._post(replica, "/update_weight_version", new_version=label) for replica in replicas)
                await _all(self._post(replica, "/start_weight_update") for replica in replicas)
                await _all(self._post(replica, "/update_weights", update_info=info) for replica, info in pairs)
                version = msgspec.Raw(msgspec.json.encode(str(message.version)))
                await _all(self._post(replica, "/finish_weight_update", weight_version=version) for replica in replicas)
                # Before generation goes on: after it, requests could find keys and values of the old weights.
                await _all(
                    self._post(replica, "/reset_prefix_cache?reset_running_requests=true") for replica in replicas
                )
                await _all(self._post(replica, "/resume") for replica in replicas)
                for replica in replicas:
                    replica.weight_version = message.version
                self._replicas.updated(message.version)
            except BaseException:
                await asyncio.gather(*(self._post(replica, "/resume") for replica in replicas), return_exceptions=True)
                raise
            finally:
                for replica in replicas:
                    replica.updating = False
            seconds = asyncio.get_running_loop().time() - start
            log.info("weights %d are in use after %.2f s", message.version, seconds)

    def _match(self, incarnations: Sequence[str], infos: Sequence[msgspec.Raw]) -> list[tuple[Replica, msgspec.Raw]]:
        replicas = self._replicas.all
        if not len(incarnations) == len(infos) == len(replicas):
            raise WeightsRefused(
                f"this node has {len(replicas)} replicas; "
                f"the request names {len(incarnations)} incarnations and {len(infos)} infos"
            )
        for replica, incarnation in zip(replicas, incarnations, strict=True):
            if not replica.up or replica.bound() != incarnation:
                raise WeightsRefused(f"{replica.name} was restarted or is not there: ask for the health again")
        return list(zip(replicas, infos, strict=True))

    async def _post(self, replica: Replica, path: str, **fields: msgspec.Raw) -> None:
        slow = path.startswith(("/init", "/update", "/finish"))
        try:
            await replica.vllm.request("POST", path, msgspec.json.encode(fields), TRANSFER_S if slow else STEP_S)
        except (VllmError, VllmUnreachable) as error:
            if isinstance(error.__cause__, TimeoutError):
                # Its engine hangs, of which `/health` says nothing: whoever waits for it waits for its restart.
                replica.up = False
            raise WeightsFailed(f"{replica.name} failed at {path.partition('?')[0]}: {error}") from error


async def _all(steps: Iterable[Awaitable[None]]) -> None:
    """Waits for all of them; when one fails, the others are given up at once: they may wait for a sender that gives
    up too.
    """
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
