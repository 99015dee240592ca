"""The trainer's side of a weight transfer: one sender, one group over all vLLM replicas of all rollout servers."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

from hpc_gym.protocol.client import RolloutClient, RolloutServerError
from hpc_gym.protocol.messages import WeightsInit, WeightsUpdate
from hpc_gym.weights.wire import TensorSpec, TransferGroup, Transport, buckets, listening_store, pack

Result = TypeVar("Result")
NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightTransferError(RuntimeError):
    """Weights did not arrive everywhere; the text says where and why. The next `send` makes a new group and sends
    all again.
    """


@dataclass(frozen=True)
class _Server:
    """Who must take part at one rollout server: its replicas' incarnations and numbers of workers."""

    number: int
    incarnations: tuple[str, ...]
    world_sizes: tuple[int, ...]


class WeightSender:
    """Sends whole sets of weights to every replica.

    `address` is this machine's, as the rollout nodes reach it; `folder` is on storage shared with them (used by
    `filesystem` only). At most two buckets of `bucket_bytes` are held at a time. Every wait ends after `timeout_s`; a
    rollout server that fails meanwhile ends the wait with its own cause.
    """

    def __init__(
        self,
        client: RolloutClient,
        transport: Transport,
        *,
        address: str,
        folder: Path,
        bucket_bytes: int = 1 << 28,
        timeout_s: float = 600.0,
        ready_within_s: float = 600.0,
    ) -> None:
        self._client = client
        self._transport = transport
        self._address = address
        self._folder = folder
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._ready_within_s = ready_within_s
        self._group: TransferGroup | None = None
        self._members: tuple[_Server, ...] = ()

    def wait_ready(self) -> None:
        """Waits until every replica is there: one that is started again takes its time. Raises WeightTransferError."""
        try:
            self._client.wait_ready(self._ready_within_s)
        except (RolloutServerError, OSError) as error:
            raise WeightTransferError(str(error)) from error

    def send(self, specs: Sequence[TensorSpec], tensors: NamedTensors, version: int) -> None:
        """Lets every replica generate with these weights from now on, under the number `version`.

        `tensors` yields what `specs` announces, in that order; a tensor is used only until the next one is asked for,
        so that an iterator may gather one ZeRO-3 shard after the other. Raises WeightTransferError.
        """
        try:
            self._form_group()
            if self._transport == "filesystem":
                self._send_folder(specs, iter(tensors), version)
            else:
                self._send_buckets(specs, iter(tensors), version)
        except WeightTransferError:
            self.close()
            raise
        except (RolloutServerError, RuntimeError, OSError) as error:
            self.close()
            raise WeightTransferError(f"weights {version} did not reach every vLLM replica: {error}") from error

    def close(self) -> None:
        """Leaves the group; the next `send` makes a new one."""
        group, self._group, self._members = self._group, None, ()
        if group is not None:
            group.close()

    def _form_group(self) -> None:
        """A group with exactly the replicas that live now: one that was restarted is not in the old group any more."""
        members = tuple(
            _Server(
                number,
                tuple(replica.incarnation for replica in health.replicas),
                tuple(replica.world_size for replica in health.replicas),
            )
            for number, health in enumerate(self._client.wait_ready(self._ready_within_s))
        )
        if members == self._members:
            return
        self.close()
        world_size = 1 + sum(sum(server.world_sizes) for server in members)
        store = None if self._transport == "filesystem" else listening_store(self._address, self._timeout_s)
        offset = 1
        joining: list[Future[Any]] = []
        for server in members:
            infos = []
            for workers in server.world_sizes:
                infos.append(self._init_info(store, offset, world_size))
                offset += workers
            message = WeightsInit(incarnations=list(server.incarnations), init_info=infos)
            joining.append(self._client.weights_init(server.number, message, self._timeout_s))
        if store is not None:
            transport, timeout_s = self._transport, self._timeout_s
            made = _in_thread(lambda: TransferGroup(transport, store, 0, world_size, timeout_s))
            self._wait_all([made, *joining], "the vLLM replicas did not join the weight transfer group")
            self._group = made.result()
        else:
            self._wait_all(joining, "the vLLM replicas did not take the weight transfer settings")
        self._members = members

    def _init_info(self, store: dist.TCPStore | None, offset: int, world_size: int) -> msgspec.Raw:
        info = {
            "transport": self._transport,
            "address": self._address,
            "port": 0 if store is None else store.port,
            "rank_offset": offset,
            "world_size": world_size,
            "bucket_bytes": self._bucket_bytes,
            "timeout_s": self._timeout_s,
        }
        return msgspec.Raw(msgspec.json.encode(info))

    def _announce(self, version: int, info: dict[str, Any]) -> list[Future[Any]]:
        raw = msgspec.Raw(msgspec.json.encode(info))
        return [
            self._client.weights_update(
                server.number,
                WeightsUpdate(
                    version=version,
                    incarnations=list(server.incarnations),
                    update_info=[raw] * len(server.incarnations),
                ),
                self._timeout_s,
            )
            for server in self._members
        ]

    def _send_buckets(
        self, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]], version: int
    ) -> None:
        assert self._group is not None
        group = self._group
        receiving = self._announce(version, {"tensors": [spec.to_wire() for spec in specs]})

        def check() -> None:
            for future in receiving:
                if future.done():
                    future.result()

        def await_bucket() -> None:
            try:
                group.wait(check)
            except RuntimeError:
                # A worker that fails closes its connections first; a moment later its server says why.
                _raise_first(receiving, within_s=5.0)
                raise

        for bucket in buckets(specs, self._bucket_bytes):
            packed = pack(bucket, _checked(bucket, tensors), group.device)
            await_bucket()
            group.begin_broadcast(packed)
        await_bucket()
        self._wait_all(receiving, f"weights {version} were sent, but not loaded")

    def _send_folder(
        self, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]], version: int
    ) -> None:
        from safetensors.torch import save_file

        folder, partial = self._folder / f"version-{version}", self._folder / f"version-{version}.partial"
        for stale in (folder, partial):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, bucket in enumerate(buckets(specs, self._bucket_bytes)):
            named = zip((spec.name for spec in bucket), _checked(bucket, tensors), strict=True)
            save_file(
                {name: tensor.detach().cpu().clone() for name, tensor in named}, partial / f"{number:05}.safetensors"
            )
        partial.rename(folder)
        self._wait_all(self._announce(version, {"folder": str(folder)}), f"weights {version} were not loaded")
        for other in self._folder.glob("version-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _wait_all(self, futures: Sequence[Future[Any]], what: str) -> None:
        """Returns when all are done; the first that failed is raised at once, whatever the others do."""
        end = time.monotonic() + self._timeout_s
        waiting = list(futures)
        while waiting:
            for future in [future for future in waiting if future.done()]:
                try:
                    future.result()
                except Exception as error:
                    raise WeightTransferError(f"{what}: {error}") from error
                waiting.remove(future)
            if waiting and time.monotonic() > end:
                raise WeightTransferError(f"{what} within {self._timeout_s:g} s")
            time.sleep(0.001)


def _raise_first(futures: Sequence[Future[Any]], within_s: float) -> None:
    """Raises the error of the first future that fails in that time, if any does."""
    with contextlib.suppress(TimeoutError):
        for future in as_completed(futures, timeout=within_s):
            future.result()


def _checked(bucket: Sequence[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """The next tensors, for this bucket. Raises ValueError when they are not the announced ones."""
    for spec, (name, tensor) in zip(bucket, islice(tensors, len(bucket)), strict=True):
        if name != spec.name:
            raise ValueError(f"weight '{name}' comes where '{spec.name}' was announced")
        yield tensor


def _in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Runs `work` in a daemon thread: unlike an executor's, it cannot keep the process from ending while it waits
    for a peer.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight-transfer-group", daemon=True).start()
    return future
