"""What the ranks tell one another besides gradients: small facts on the CPU, in a gloo group of their own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hpc_gym.protocol.notify import notify

Value = TypeVar("Value")

WATCHDOG_S = 2.0
POLL_S = 0.001
_SMALL = 1 << 18
"""Numbers in the all-reduce that is tried first: 1 MiB."""
_SMALL_WITHIN_S = 60.0
"""NCCL makes its connections in it: seconds, for hundreds of ranks."""


class CollectiveFailed(Exception):
    """The ranks cannot work together."""


class Ranks:
    """The ranks of the training run, which call every method together and in the same order.

    One rank may be in a long rollout while the others wait here: waiting says `WATCHDOG=1`, and a rank that died ends
    the wait at once because its connections close. `timeout_s` is only the last resort, so it may be long.
    """

    def __init__(self, timeout_s: float = 6 * 3600.0) -> None:
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.maximum([float(flag)])[0] > 0

    def maximum(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number over all ranks."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def from_first(self, value: Value) -> Value:
        """The value that rank 0 passed."""
        self.barrier()  # with the watchdog, which the broadcast of objects has not
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        self.maximum([0.0])

    def _reduce(self, numbers: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        work = dist.all_reduce(tensor, op=operation, group=self._group, async_op=True)
        said = time.monotonic()
        while not work.is_completed():
            if time.monotonic() - said > WATCHDOG_S:
                notify(WATCHDOG=1)
                said = time.monotonic()
            time.sleep(POLL_S)
        work.wait()
        reduced: list[float] = tensor.tolist()
        return reduced


def check_collectives(ranks: Ranks) -> float:
    """A small all-reduce of all ranks by the way that gradients will go, while the rollout nodes load; the seconds it
    took. Raises CollectiveFailed where it gives a wrong sum or does not end in time: without this, the first step would
    wait for half an hour.
    """
    tensor = torch.ones(_SMALL, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    ranks.barrier()
    began = time.monotonic()
    work = dist.all_reduce(tensor, async_op=True)
    where = f"{dist.get_backend()} over {ranks.world_size} ranks (cluster.network_interface chooses its interface)"
    while not work.is_completed():
        if time.monotonic() - began > _SMALL_WITHIN_S:
            raise CollectiveFailed(f"a small all-reduce by {where} did not end within {_SMALL_WITHIN_S:g} s")
        time.sleep(POLL_S)
    work.wait()
    if not bool((tensor == ranks.world_size).all()):
        raise CollectiveFailed(f"a small all-reduce by {where} gave a wrong sum: a GPU or a link is broken")
    return time.monotonic() - began


def start_distributed(timeout_s: float) -> bool:
    """Connects the ranks named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; True where they train on GPUs.

    On CPUs DeepSpeed runs on plain gloo: its shared-memory collectives would need a C++ compiler on the node and
    compile for 40 s. It must be initialised before TRL's configuration is built, because `use_cpu` makes transformers
    skip that, and ZeRO-3 then counts one rank too few.
    """
    on_gpu: bool = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # It takes the group that is there.
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return on_gpu


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The store at which the ranks meet, served by rank 0 on MASTER_ADDR alone: torch's own listener takes connections
    from every network that the node is in, and asks nobody who he is.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        return dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        # The supervisor holds the port with a socket that does not listen.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(4096)
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
