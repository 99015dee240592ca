"""hpc-gym's worker extension with a switch: without repacking, one sees what vLLM alone does to a tied LM head."""

from __future__ import annotations

from hpc_gym.weights import worker


class SwitchableExtension(worker.WorkerExtension):
    """`POST /collective_rpc {"method": "repack_lm_heads", "args": [false]}` turns the repacking off."""

    def repack_lm_heads(self, on: bool) -> None:
        worker.repack_tied_lm_heads = _repack if on else lambda model: None


_repack = worker.repack_tied_lm_heads
