"""The vLLM replicas of a rollout node: which are there, which weights they have, and which may be given rollouts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_gym.protocol import messages
from hpc_gym.rollout.vllm import Vllm, VllmError, VllmUnreachable

log = logging.getLogger(__name__)

POLL_S = 0.5
ASK_S = 5.0
UNKNOWN_WEIGHTS = -1
FIRST_LABEL = "default"
"""vLLM's label of the weights it loaded at its start."""


def version_of(label: str) -> int:
    """The weight version that a label of vLLM stands for: 0 for the first weights, unknown for a label that is not
    ours.
    """
    if label == FIRST_LABEL:
        return 0
    return int(label) if label.isdecimal() else UNKNOWN_WEIGHTS


class Replica:
    """One replica. A restarted vLLM binds its socket anew, so the socket's inode and time tell its incarnations
    apart.
    """

    def __init__(self, vllm: Vllm) -> None:
        self.vllm = vllm
        self.incarnation = ""
        self.up = False
        self.updating = False
        self.weight_version = UNKNOWN_WEIGHTS
        self.world_size = 0
        self._mute = ""
        """The incarnation whose engine does not answer."""

    @property
    def name(self) -> str:
        return self.vllm.name

    def bound(self) -> str:
        """The incarnation whose socket lies there now; empty when there is none."""
        try:
            found = Path(self.vllm.socket_path).stat()
        except OSError:
            return ""
        return f"{found.st_ino:x}-{found.st_mtime_ns:x}"

    async def look(self) -> None:
        """Finds out whether it is there, and what it has when it is new."""
        bound = self.bound()
        if not bound or not await self.vllm.healthy(ASK_S):
            if self.up:
                log.warning("%s no longer answers", self.name)
            self.up = False
            return
        if self.up and bound == self.incarnation:
            return
        try:
            label = await self.vllm.weight_label(ASK_S)
            self.world_size = await self.vllm.world_size(ASK_S)
        except (VllmError, VllmUnreachable, msgspec.MsgspecError) as error:
            if self._mute != bound:
                log.warning("%s is there, but does not say which weights it has: %s", self.name, error)
            self._mute = bound
            return
        self._mute = ""
        self.weight_version, self.incarnation, self.up = version_of(label), bound, True
        log.info("%s is ready with weights %s (incarnation %s)", self.name, label, bound)


class Replicas:
    """All replicas of the node. Replica k listens on `{private_dir}/vllm-k.sock`."""

    def __init__(self, private_dir: str, count: int) -> None:
        self.all: Sequence[Replica] = tuple(
            Replica(Vllm(f"vllm-{number}", f"{private_dir}/vllm-{number}.sock")) for number in range(count)
        )
        self._newest = 0

    async def watch(self) -> None:
        """Looks at them for ever."""
        while True:
            await asyncio.gather(*(replica.look() for replica in self.all if not replica.updating))
            self._newest = max(self._newest, *(replica.weight_version for replica in self.all))
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        for replica in self.all:
            await replica.vllm.close()

    @property
    def newest(self) -> int:
        """The newest weights that any replica was given."""
        return self._newest

    def updated(self, version: int) -> None:
        """Weights of that version were sent: replicas with older ones are stale."""
        self._newest = max(self._newest, version)

    def usable(self, replica: Replica, weight_version: int) -> bool:
        """Whether it may be given rollouts that want at least these weights."""
        return replica.up and replica.weight_version >= max(self._newest, weight_version)

    def choose(self, group: int, weight_version: int) -> Replica | None:
        """A usable replica, for all rollouts of a group the same one: their prompt is in its cache."""
        for shift in range(len(self.all)):
            replica = self.all[(group + shift) % len(self.all)]
            if self.usable(replica, weight_version):
                return replica
        return None

    def hopeless(self, weight_version: int) -> str:
        """Why no replica will be usable without a new weight update; empty when waiting may help."""
        wanted = max(self._newest, weight_version)
        if wanted == 0 or any(replica.up and replica.weight_version >= wanted for replica in self.all):
            return ""
        has = ", ".join(
            f"{replica.name} has {replica.weight_version}" if replica.up else f"{replica.name} is starting"
            for replica in self.all
        )
        return f"weights_stale: weights {wanted} are wanted, {has}"

    def health(self) -> list[messages.Replica]:
        """What `GET /health` says of them."""
        return [
            messages.Replica(
                state="updating"
                if replica.updating
                else "loading"
                if not replica.up
                else "stale"
                if replica.weight_version < self._newest
                else "ready",
                incarnation=replica.incarnation if replica.up else "",
                weight_version=max(0, replica.weight_version),
                world_size=replica.world_size,
            )
            for replica in self.all
        ]
