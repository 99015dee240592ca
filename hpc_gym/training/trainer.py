"""TRL's GRPOTrainer with what hpc-gym adds at its seams. Written against TRL 1.16, whose private attributes it sets."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer

from hpc_gym.protocol.alive import saying_alive
from hpc_gym.protocol.notify import notify
from hpc_gym.training.checkpoints import Checkpoint, Checkpoints
from hpc_gym.training.policy import PolicyWeights
from hpc_gym.training.ranks import Ranks
from hpc_gym.training.repartition import repartitioning


class OffPolicy(RuntimeError):
    """vLLM sampled from another policy than the one that is trained; the text says by how much."""


@dataclass(frozen=True)
class PolicyDifference:
    """|log p(trainer) - log p(vLLM)| over tokens that the policy generated, on all ranks."""

    total: float = 0.0
    tokens: int = 0
    largest: float = 0.0
    unknown: int = 0
    """Tokens for which vLLM gave no log-probability; they are in none of the others."""

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)

    def __add__(self, other: PolicyDifference) -> PolicyDifference:
        return PolicyDifference(
            self.total + other.total,
            self.tokens + other.tokens,
            max(self.largest, other.largest),
            self.unknown + other.unknown,
        )


class PolicyTrainer(GRPOTrainer):
    """GRPO on rollouts from elsewhere.

    Invariants: vLLM has the weights of `state.global_step` whenever rollouts are asked for; every step's rollouts are
    checked to come from these weights; a checkpoint counts only when all ranks have written it.
    """

    def __init__(
        self,
        *arguments: Any,
        ranks: Ranks,
        checkpoints: Checkpoints,
        resumed: Checkpoint | None,
        prompts_per_step: int,
        on_policy_tolerance: float,
        flush_metrics: Callable[[], None],
        **keywords: Any,
    ) -> None:
        """`flush_metrics` returns when the metrics of the steps so far cannot be lost any more."""
        super().__init__(*arguments, **keywords)
        self.remove_callback(PrinterCallback)  # StepCallback says it, in one line
        self.pad_token_id: int = self._tokenizer.pad_token_id
        self.policy_difference = PolicyDifference()
        """Of all rollouts since it was last reset."""
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._resumed = resumed
        self._prompts_per_step = prompts_per_step
        self._on_policy_tolerance = on_policy_tolerance
        self._flush_metrics = flush_metrics

    def use_policy_weights(self, weights: PolicyWeights) -> None:
        """Lets TRL push weights before each generation and correct for the sampler's own probabilities.

        With `use_vllm` in the configuration TRL would want vLLM installed here and bring its own client; set afterwards
        it only calls `sync_weights` at every new step and turns the importance-sampling correction on.
        """
        self.vllm_generation = weights
        self._last_loaded_step = -1
        self.use_vllm = True
        self.vllm_importance_sampling_correction = True

    def push_weights(self) -> None:
        """Brings the weights of this moment into vLLM, unless they are there."""
        if self._last_loaded_step != self.state.global_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        difference = self._difference(output)
        self._check_on_policy(difference)
        self.policy_difference += difference
        return output

    def _difference(self, batch: dict[str, Any]) -> PolicyDifference:
        """Batch as TRL made it; the tensors are [rows, completion tokens] of this rank."""
        generated = (batch["completion_mask"] * batch["tool_mask"]).bool()
        sampled = batch["sampling_per_token_logps"][generated].double()
        trained = batch["old_per_token_logps"][generated].double()
        known = ~torch.isnan(sampled)
        difference = (trained[known] - sampled[known]).abs()
        total, count, unknown = self._ranks.total(
            [difference.sum().item(), float(len(difference)), float((~known).sum().item())]
        )
        largest = self._ranks.maximum([difference.max().item() if len(difference) else 0.0])[0]
        return PolicyDifference(total, int(count), largest, int(unknown))

    def _check_on_policy(self, difference: PolicyDifference) -> None:
        step = self.state.global_step + 1
        if math.isnan(difference.mean):
            raise OffPolicy(
                f"step {step}: the trainer's log-probabilities of the rollouts are not numbers: the model diverged"
            )
        if not self._on_policy_tolerance:
            return
        if difference.mean > self._on_policy_tolerance:
            raise OffPolicy(
                f"step {step}: mean |log p(trainer) - log p(vLLM)| is {difference.mean:.3g}, more than the allowed "
                f"{self._on_policy_tolerance:g} (on_policy_tolerance): vLLM does not generate with the trained weights"
            )
        if difference.unknown:
            raise OffPolicy(f"step {step}: vLLM gave no log-probability for {difference.unknown} tokens")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Also loads the checkpoint. A rank that finds no random state of its own starts from the seed, as transformers
        does it: the data and the rollouts do not depend on it.
        """
        resumed = self._resumed
        if resumed is None or resumed.world_size == self._ranks.world_size:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        with saying_alive(), repartitioning(self.model_wrapped, resumed):
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL writes a page for the hub beside the checkpoints; nothing here goes there."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        # Rank 0 looks: the others' view of shared storage may lag behind.
        if self._ranks.any(self._ranks.is_first and self._checkpoints.is_complete(step)):
            return
        notify(X_SAVING=1)
        began = time.monotonic()
        try:
            with saying_alive():
                super()._save_checkpoint(model, trial)
                self._checkpoints.make_durable(step, self._ranks.rank)
                self._ranks.barrier()
                if self._ranks.is_first:
                    self._flush_metrics()
                    draws, seconds = step * self._prompts_per_step, time.monotonic() - began
                    self._checkpoints.mark_complete(step, self._ranks.world_size, draws, seconds)
                    self._checkpoints.prune()
                self._ranks.barrier()
        finally:
            notify(X_SAVING=0)

    def save_now(self) -> None:
        """Writes a checkpoint of the last finished step, unless there is one. Also after training was left by an
        exception.
        """
        if self.state.global_step > 0:
            self._save_checkpoint(self.model, None)


def quiet_libraries() -> None:
    """Leaves in the log what a reader of it needs: no progress bars, no warning per row.

    TRL warns of every row without a reward, printing the whole row; a failed rollout is said in one line by us.
    """
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(
        lambda record: "All reward functions returned None" not in record.getMessage()
    )
