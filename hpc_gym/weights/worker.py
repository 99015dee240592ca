"""vLLM's side of a weight transfer: an engine for vLLM's weight-transfer factory, and the worker extension that
registers it.

`vllm serve MODEL --worker-extension-cls hpc_gym.weights.worker.WorkerExtension --weight-transfer-config '{"backend":
"hpc_gym"}'` (with `VLLM_SERVER_DEV_MODE=1`). vLLM imports the extension's module in each worker before it creates the
engine, so that registering at import is enough. Written against vLLM 0.32; runs in the inference runtime only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from hpc_gym.protocol.alive import saying_alive
from hpc_gym.protocol.notify import notify
from hpc_gym.weights.wire import TensorSpec, TransferGroup, Transport, bucket_nbytes, buckets, join_group, unpack

BACKEND = "hpc_gym"
logger = init_logger("vllm.hpc_gym")


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the sender's store is, and which ranks the workers of this replica take, from `rank_offset` on."""

    transport: Transport
    address: str = ""
    port: int = 0
    rank_offset: int = 1
    world_size: int = 0
    bucket_bytes: int = 1 << 28
    timeout_s: float = 120.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`tensors`: what comes, `TensorSpec.to_wire` each; or `folder`: safetensors files on shared storage."""

    tensors: list[list[Any]] | None = None
    folder: str = ""


class Engine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives checkpoint-format weights over gloo, NCCL or a shared folder, and reloads the model layer by layer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: TransferGroup | None = None
    _info: InitInfo | None = None
    _unfinished = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        self._info = init_info
        if init_info.transport == "filesystem":
            return
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        with saying_alive():  # nobody gets an answer of the engine meanwhile; the others' deadlines end the wait
            self._group = join_group(
                init_info.transport,
                init_info.address,
                init_info.port,
                init_info.rank_offset + worker,
                init_info.world_size,
                init_info.timeout_s,
            )

    def start_weight_update(self) -> None:
        # After a transfer that broke off, layers hold half of its tensors. vLLM would count them as loaded already and
        # take the next transfer's first tensors for their rest: close that reload first; everything comes again.
        if self._unfinished:
            finalize_layerwise_reload(self.model, self.model_config)
        self._unfinished = True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own calls torch.accelerator.synchronize(), which raises where there is no accelerator.
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            # Closes the connections, so that the sender does not wait for this worker to take more.
            self.shutdown()
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        source = self._from_folder(update_info) if update_info.folder else self._from_group(update_info)
        count = 0
        for named in source:
            self.model.load_weights(iter(named))
            count += len(named)
            notify(WATCHDOG=1)
        logger.info("hpc_gym: loaded %d tensors", count)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._unfinished = False
        repack_tied_lm_heads(self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _from_group(self, update_info: UpdateInfo) -> Iterator[list[tuple[str, torch.Tensor]]]:
        if self._group is None or self._info is None or update_info.tensors is None:
            raise RuntimeError("no weight transfer group: the sender must let this replica join one first")
        specs = [TensorSpec.from_wire(item) for item in update_info.tensors]
        for bucket in buckets(specs, self._info.bucket_bytes):
            packed = torch.empty(bucket_nbytes(bucket), dtype=torch.uint8, device=self._group.device)
            self._group.begin_broadcast(packed)
            with saying_alive():
                self._group.wait()
            yield unpack(bucket, packed)

    def _from_folder(self, update_info: UpdateInfo) -> Iterator[list[tuple[str, torch.Tensor]]]:
        from safetensors.torch import load_file

        paths = sorted(Path(update_info.folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no *.safetensors in {update_info.folder} as this node sees it")
        for path in paths:
            yield list(load_file(path).items())


def repack_tied_lm_heads(model: torch.nn.Module) -> None:
    """Gives every LM head on CPU the weights of the embedding it is tied to.

    vLLM 0.32 prepacks an LM head's weights on CPU (`vocab_parallel_embedding.py`, `dispatch_cpu_unquantized_gemm`). A
    tied head receives no tensor of its own in a reload, so that `reload/layerwise.py` only puts its old tensors back
    ("ParallelLMHead: Failed to load weights" in the log), and the packed copy keeps generating with the old weights:
    log-probabilities were off by up to 3.9. Once per update and cheap. On GPUs the head reads the embedding itself.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension:
    """Mixed into vLLM's worker class. Importing its module registers the engine."""

    _weight_update_active: bool
    weight_transfer_engine: Any

    def abandon_weight_update(self) -> None:
        """Ends an update that was begun and will not be finished, because the rollout server that began it is dead:
        vLLM would refuse to begin another. The engine then closes what is half loaded.
        """
        if self._weight_update_active:
            self._weight_update_active = False
            self.weight_transfer_engine.reset_weight_update_target()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Engine)
