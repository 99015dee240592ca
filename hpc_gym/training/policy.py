"""The policy's weights on their way to vLLM: gathered over the ranks, sent by rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from hpc_gym.protocol.alive import saying_alive
from hpc_gym.training.ranks import Ranks
from hpc_gym.training.stopping import StopRequested, StopSignal
from hpc_gym.weights.sender import WeightSender, WeightTransferError
from hpc_gym.weights.wire import TensorSpec, buckets

RETRY_S = 2.0
"""A rollout server needs a moment to notice that a replica is gone; then the sender waits for its restart."""
GATHERED_BYTES = 1 << 28
"""ZeRO-3 gathers parameters in groups of so many bytes: one by one is slow, all at once does not fit."""
_STOPPED = "stopped"


class PolicyWeights:
    """Brings the trained weights into every vLLM replica. TRL calls `sync_weights` on all ranks before it generates.

    `sender` is rank 0's, None on the others. `model` gives the module to send, without DeepSpeed's wrapper; `step` the
    number of steps it was trained for, which is the version of its weights. A transfer that broke, for instance because
    a replica was restarted in its middle, is repeated with a new group, `attempts` times in all.
    """

    def __init__(
        self,
        model: Callable[[], torch.nn.Module],
        step: Callable[[], int],
        ranks: Ranks,
        sender: WeightSender | None,
        stop: StopSignal,
        attempts: int = 3,
    ) -> None:
        self._model = model
        self._step = step
        self._ranks = ranks
        self._sender = sender
        self._stop = stop
        self._attempts = attempts
        self.seconds = 0.0
        """Time spent in transfers, in all."""

    def sync_weights(self) -> None:
        """Sends the weights. Raises WeightTransferError on all ranks alike, and StopRequested when a stop comes while a
        replica is waited for, which may be starting again.
        """
        started = time.monotonic()
        specs, named = _parameters(self._model())
        version = self._step()
        for attempt in range(1, self._attempts + 1):
            error = ""
            tensors = _gathered(specs, named)
            if self._sender is not None:
                try:
                    with saying_alive():  # the sender has a deadline for everything it waits for
                        with self._stop.interruptible():
                            self._sender.wait_ready()
                        self._sender.send(specs, tensors, version)
                except WeightTransferError as failure:
                    error = str(failure)
                except StopRequested:
                    error = _STOPPED
            # Gathering is a collective: who does not send, or stopped sending, still takes part to the end.
            for _ in tensors:
                pass
            error = self._ranks.from_first(error)
            if not error:
                break
            if error == _STOPPED:
                raise StopRequested
            if attempt == self._attempts:
                raise WeightTransferError(f"{error} (tried {attempt} times)")
            if self._ranks.is_first:
                print(f"weights {version}: attempt {attempt} failed, trying again: {error}", flush=True)
            time.sleep(RETRY_S)
        self.seconds += time.monotonic() - started


def _parameters(model: torch.nn.Module) -> tuple[list[TensorSpec], list[torch.Tensor]]:
    """The parameters with their full shapes, also where ZeRO-3 left this rank an empty tensor. A tied one comes
    once.
    """
    named = list(model.named_parameters())
    specs = [TensorSpec(name, tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape))) for name, tensor in named]
    return specs, [tensor for _, tensor in named]


def _gathered(specs: list[TensorSpec], parameters: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of each parameter; under ZeRO-3 a tensor is full until the next one is asked for."""
    start = 0
    for group in buckets(specs, GATHERED_BYTES):
        part = parameters[start : start + len(group)]
        with gathering(part):
            for spec, parameter in zip(group, part, strict=True):
                yield spec.name, parameter.detach()
        start += len(group)


def gathering(parameters: list[torch.Tensor]) -> Any:
    """A context in which the parameters are whole on every rank; nothing happens where they always are."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
