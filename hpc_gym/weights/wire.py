"""What trainer and vLLM workers must agree on to move weights: buckets of packed tensors, and a private process group.

Needs torch and the standard library only, because it runs in the train and in the inference runtime. Both sides derive
the buckets from the same list of tensors, so nothing but bytes crosses the wire.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

Transport = Literal["gloo", "nccl", "filesystem"]

ALIGNMENT = 16
"""Every tensor begins at a multiple of so many bytes of its bucket, so that the receiver needs no copy to view it."""
POLL_S = 0.0005
CLOSE_WITHIN_S = 5.0


class TransferTimeout(TimeoutError):
    """The peers of a transfer did not appear, or did not take or send a bucket, in time."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and full shape of one parameter, as a Hugging Face checkpoint has them."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(self.dtype.itemsize) * math.prod(self.shape)

    @property
    def padded_nbytes(self) -> int:
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    def to_wire(self) -> list[Any]:
        """As JSON: `[name, "float32", [rows, columns]]`."""
        return [self.name, str(self.dtype).removeprefix("torch."), list(self.shape)]

    @classmethod
    def from_wire(cls, item: Sequence[Any]) -> TensorSpec:
        """What `to_wire` gave. Raises ValueError for a dtype torch does not have."""
        name, dtype_name, shape = item
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"weight '{name}' has the unknown dtype {dtype_name!r}")
        return cls(name, dtype, tuple(shape))


def buckets(specs: Iterable[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """The tensors in order, in lists of at most `limit` bytes; a tensor that is larger gets a list of its own."""
    bucket: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if bucket and size + spec.padded_nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(spec)
        size += spec.padded_nbytes
    if bucket:
        yield bucket


def bucket_nbytes(bucket: Sequence[TensorSpec]) -> int:
    """Bytes of a packed bucket."""
    return sum(spec.padded_nbytes for spec in bucket)


def pack(bucket: Sequence[TensorSpec], tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One uint8 tensor on `device` with the tensors of the bucket, in order.

    Raises ValueError when a tensor is not what its spec says: the receiver would cut the bytes at the wrong places.
    """
    packed = torch.empty(bucket_nbytes(bucket), dtype=torch.uint8, device=device)
    offset = 0
    for spec, tensor in zip(bucket, tensors, strict=True):
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"weight '{spec.name}' is {tensor.dtype} {tuple(tensor.shape)}, announced was {spec}")
        packed[offset : offset + spec.nbytes].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        offset += spec.padded_nbytes
    return packed


def unpack(bucket: Sequence[TensorSpec], packed: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of a packed bucket: views of `packed`."""
    found = []
    offset = 0
    for spec in bucket:
        part = packed[offset : offset + spec.nbytes]
        found.append((spec.name, part.view(spec.dtype).view(spec.shape)))
        offset += spec.padded_nbytes
    return found


def own_address(peer: str, port: int) -> str:
    """The address of this machine that packets to `peer` leave from."""
    family, kind, protocol, _, target = socket.getaddrinfo(peer, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket sends nothing here: the kernel only picks the route
        return str(probe.getsockname()[0])


def listening_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The store at which the members of a group meet: served by this process, on `address` only, at a port of its own.

    torch's own listener would bind every interface of the node.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.bind(target)
        listener.listen(1024)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class TransferGroup:
    """A process group of the sender (rank 0) and all vLLM workers, apart from any group they have among themselves.

    `store` is the sender's `listening_store`, or a client's connection to it. Constructing it blocks until all members
    have joined. gloo binds the interface named by `HPC_GYM_INTERFACE`, else by `GLOO_SOCKET_IFNAME`, else the address
    that this side reaches the store from: binding the sender's address, as a shared host name would, only works on one
    node.
    """

    def __init__(
        self, transport: Transport, store: dist.TCPStore, rank: int, world_size: int, timeout_s: float
    ) -> None:
        self.timeout_s = timeout_s
        self._device = torch.device("cpu")
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None
        prefix = dist.PrefixStore("weights", store)
        # Kept: the store must outlive the group.
        self._store: dist.TCPStore | None = store
        if transport == "gloo":
            gloo = dist.ProcessGroupGloo._Options()
            gloo._timeout = timedelta(seconds=timeout_s)
            gloo._devices = [_gloo_device(store)]
            self._group: Any = dist.ProcessGroupGloo(prefix, rank, world_size, gloo)
        elif transport == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=timeout_s)
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._group = dist.ProcessGroupNCCL(prefix, rank, world_size, nccl)
            # NCCL only connects at the first collective: fail here, where a failure is understood.
            self.begin_broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device))
            self.wait()
        else:
            raise ValueError(f"weights do not travel in a process group by {transport!r}")

    @property
    def device(self) -> torch.device:
        """Where the buckets must be."""
        return self._device

    def begin_broadcast(self, tensor: torch.Tensor) -> None:
        """Starts to send (rank 0) or receive the tensor, which must stay as it is until `wait` has returned."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._under_way = self._group.broadcast([tensor], options), tensor

    def wait(self, check: Callable[[], None] | None = None) -> None:
        """Returns when the broadcast that is under way is done.

        `check` is called all the while and may raise, for instance because a peer reported that it failed: a broadcast
        to it would never end. Raises TransferTimeout after the group's timeout.
        """
        if self._under_way is None:
            return
        work, _ = self._under_way
        end = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if check is not None:
                check()
            if time.monotonic() > end:
                raise TransferTimeout(f"a bucket of weights was not through within {self.timeout_s:g} s")
            time.sleep(POLL_S)
        self._under_way = None
        work.wait()

    def close(self) -> None:
        """Leaves the group and closes its connections, which wakes up a peer that waits for more.

        gloo only closes them when its objects are destroyed, and destroying them waits for what is under way, with
        Python's global lock held: so that is given a moment to end, and a group where it does not is kept for ever.
        """
        if self._under_way is not None:
            work, _ = self._under_way
            end = time.monotonic() + CLOSE_WITHIN_S
            while not work.is_completed() and time.monotonic() < end:
                time.sleep(POLL_S)
            if not work.is_completed():
                _given_up.append((self._group, self._under_way, self._store))
                self._group.abort()
        # No other reference may be left, not even in a traceback: hence no method gives these objects away.
        self._group = self._under_way = self._store = None


_given_up: list[Any] = []


def join_group(
    transport: Transport, address: str, port: int, rank: int, world_size: int, timeout_s: float
) -> TransferGroup:
    """Joins the group of the sender whose store listens at `address:port`, as one of its workers."""
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return TransferGroup(transport, store, rank, world_size, timeout_s)


def _gloo_device(store: dist.TCPStore) -> Any:
    interface = os.environ.get("HPC_GYM_INTERFACE") or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        return dist.ProcessGroupGloo.create_device(interface=interface)
    return dist.ProcessGroupGloo.create_device(hostname=own_address(store.host, store.port))
