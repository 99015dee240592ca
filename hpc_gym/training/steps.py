"""What happens around every training step: metrics, evaluation, progress, agreement to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback

from hpc_gym.protocol.notify import notify
from hpc_gym.training.evaluation import Evaluator
from hpc_gym.training.metrics import Recorder
from hpc_gym.training.policy import PolicyWeights
from hpc_gym.training.ranks import Ranks
from hpc_gym.training.rollouts import RolloutFunction
from hpc_gym.training.stopping import StopRequested, StopSignal
from hpc_gym.training.trainer import PolicyDifference, PolicyTrainer

# TRL's names of what a reader of metrics.jsonl wants, and ours.
_RENAMED = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "groups_without_spread",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio/region_mean": "clip_ratio",
    "completions/mean_length": "completion_tokens",
    "sampling/importance_sampling_ratio/mean": "importance_ratio",
}


class StepCallback(TrainerCallback):
    """Hooks of one rank. All ranks call them together, and rank 0, which has the recorder, writes."""

    def __init__(
        self,
        rollouts: RolloutFunction,
        weights: PolicyWeights,
        evaluator: Evaluator,
        recorder: Recorder | None,
        ranks: Ranks,
        stop: StopSignal,
        environments: list[str],
        wait_for_servers: Callable[[], None],
    ) -> None:
        self.trainer: PolicyTrainer
        """Set by whoever makes the trainer, which wants its callbacks first."""
        self._rollouts = rollouts
        self._weights = weights
        self._evaluator = evaluator
        self._recorder = recorder
        self._ranks = ranks
        self._stop = stop
        self._environments = environments
        self._wait_for_servers = wait_for_servers
        self._began = 0.0
        self._weights_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait_for_servers()
        # Also what a stop in the middle of an evaluation left out.
        self.evaluate("before" if state.global_step == 0 else "step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()
        self._weights_before = self._weights.seconds
        self._rollouts.reset()
        self.trainer.policy_difference = PolicyDifference()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        notify(WATCHDOG=1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if math.isnan(logs["loss"]):
            raise FloatingPointError(f"step {state.global_step}: the loss is not a number")
        record = self._record(logs)
        reward = record.get("reward", math.nan)
        notify(WATCHDOG=1, STATUS=f"step {state.global_step}/{state.max_steps} reward {reward:.2f}")
        if self._recorder is not None:
            self._recorder.step(state.global_step, record)
            print(
                f"step {state.global_step}/{state.max_steps} reward {reward:.3f} logp_diff {record['logp_diff']:.2g} "
                f"{record['step_seconds']:.2f} s",
                flush=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        notify(WATCHDOG=1)
        # A stop ends the training only after this step's metrics are written, which comes next.
        with suppress(StopRequested):
            self.evaluate("step")
        if self._ranks.any(self._stop.requested):
            control.should_training_stop = True
        return control

    def evaluate(self, when: str) -> None:
        """Evaluates the weights of this moment, if the Plan wants it now."""
        step, steps = self.trainer.state.global_step, self.trainer.state.max_steps
        if when == "step" and step == steps:
            return  # that is the one after training
        if self._evaluator.wanted(step, when):
            self.trainer.push_weights()
            self._evaluator.run(step, when)

    def _record(self, logs: dict[str, float | None]) -> dict[str, float]:
        """A line of metrics.jsonl; seconds are wall-clock. What has no value in this step is left out, as the reward of
        an environment that no row of it was of.
        """
        statistics = self._rollouts.statistics
        wanted = _RENAMED | {f"rewards/{name}/mean": f"reward/{name}" for name in self._environments}
        logged = {ours: logs.get(theirs) for theirs, ours in wanted.items()}
        return {name: value for name, value in logged.items() if value is not None} | {
            "logp_diff": self.trainer.policy_difference.mean,
            "logp_diff_max": self.trainer.policy_difference.largest,
            "logp_unknown": self.trainer.policy_difference.unknown,
            "step_seconds": time.monotonic() - self._began,
            "rollout_seconds": statistics.seconds,
            "weights_seconds": self._weights.seconds - self._weights_before,
            "rollouts": statistics.rollouts,
            "failed": statistics.failed,
            "truncated": statistics.truncated,
            "tokens": statistics.tokens,
            "turns": statistics.turns,
            **({"first_draw": draws.first, "last_draw": draws.last} if (draws := self._rollouts.draws) else {}),
        }
