"""A training run from start to export, on one rank. Imports torch and TRL."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.alive import saying_alive
from hpc_gym.protocol.client import RolloutClient
from hpc_gym.protocol.notify import notify
from hpc_gym.training.checkpoints import Checkpoint, Checkpoints
from hpc_gym.training.evaluation import Evaluator
from hpc_gym.training.export import export_model
from hpc_gym.training.metrics import Recorder
from hpc_gym.training.policy import PolicyWeights
from hpc_gym.training.ranks import Ranks, check_collectives, start_distributed
from hpc_gym.training.rewards import environment_reward
from hpc_gym.training.rollouts import RolloutFunction, RolloutRunner, TrainingRows
from hpc_gym.training.settings import grpo_arguments
from hpc_gym.training.steps import StepCallback
from hpc_gym.training.stopping import StopRequested, StopSignal
from hpc_gym.training.trainer import PolicyTrainer, quiet_libraries
from hpc_gym.weights.sender import WeightSender

WAIT_FOR_SERVERS_S = 3600.0
"""The supervisor's own deadlines (vLLM, NeMo Gym) come first; this one only ends a wait that nobody else does."""


class TrainingRun:
    """Everything is made here, and DeepSpeed set up, while the rollout nodes load: then training begins at once."""

    def __init__(self, plan: Plan, client: RolloutClient, stop: StopSignal, attempt: int) -> None:
        self._client = client
        self._stop = stop
        training = plan.training
        timeout_s = _collective_timeout_s(plan)
        on_gpu = start_distributed(timeout_s)
        self._ranks = ranks = Ranks()
        seconds = check_collectives(ranks)
        if ranks.is_first:
            print(f"a first all-reduce of {ranks.world_size} ranks took {seconds:.3f} s", flush=True)
        self._checkpoints = Checkpoints(Path(plan.run_dir) / "checkpoints", training.checkpoints_kept)
        self._resumed = self._find_checkpoint(training.prompts_per_step)
        arguments = grpo_arguments(training, plan.seed, self._checkpoints.folder, on_gpu=on_gpu, timeout_s=timeout_s)
        self._recorder = Recorder(plan, attempt) if ranks.is_first else None
        self._weights = PolicyWeights(
            self._policy, self._step, ranks, _sender(plan, client) if ranks.is_first else None, stop
        )
        runner = RolloutRunner(client, ranks, stop, self._weights.sync_weights, patience_s=_may_hang_for_s(plan))
        rollouts = RolloutFunction(runner, TrainingRows(plan), ranks)
        environments = sorted({source.environment for source in training.sources})
        self._steps = StepCallback(
            rollouts,
            self._weights,
            Evaluator(plan, runner, ranks, self._recorder),
            self._recorder,
            ranks,
            stop,
            environments,
            self._wait_for_servers,
        )
        notify(STATUS="loading the model")
        quiet_libraries()
        self._trainer = PolicyTrainer(
            training.model,
            [environment_reward(environment) for environment in environments],
            GRPOConfig(**arguments),
            _draws(int(arguments["max_steps"]) * training.prompts_per_step),
            processing_class=AutoTokenizer.from_pretrained(training.model, truncation_side="left", padding_side="left"),
            callbacks=[self._steps],
            rollout_func=rollouts,
            ranks=ranks,
            checkpoints=self._checkpoints,
            resumed=self._resumed,
            prompts_per_step=training.prompts_per_step,
            on_policy_tolerance=training.on_policy_tolerance,
            flush_metrics=self._flush_metrics,
        )
        self._steps.trainer = self._trainer
        self._trainer.use_policy_weights(self._weights)

    def execute(self, export: Path) -> int:
        """Trains to the end, evaluates and exports. Returns 0; raises StopRequested after a checkpoint was written."""
        trainer = self._trainer
        try:
            trainer.train(resume_from_checkpoint=str(self._resumed.path) if self._resumed else None)
            if self._ranks.any(self._stop.requested):
                raise StopRequested
            self._steps.evaluate("after")
        except StopRequested:
            trainer.save_now()
            raise
        notify(STATUS="exporting the model")
        export_model(trainer, export, self._ranks)
        notify(STATUS=f"trained {trainer.state.global_step} steps")
        return 0

    def _wait_for_servers(self) -> None:
        with suppress(StopRequested), saying_alive(), self._stop.interruptible():
            self._client.wait_ready(WAIT_FOR_SERVERS_S, lambda status: notify(STATUS=f"waiting: {status}"))
        if self._ranks.any(self._stop.requested):
            raise StopRequested
        notify(READY=1, STATUS="training")

    def close(self, exit_code: int) -> None:
        """Ends what outlives the process otherwise."""
        if self._recorder is not None:
            self._recorder.close(exit_code)

    def _flush_metrics(self) -> None:
        if self._recorder is not None:
            self._recorder.flush()

    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)

    def _step(self) -> int:
        return int(self._trainer.state.global_step)

    def _find_checkpoint(self, prompts_per_step: int) -> Checkpoint | None:
        """Rank 0 looks, so that all ranks take the same one whatever the file system shows them yet."""
        found = None
        if self._ranks.is_first:
            self._checkpoints.remove_torn()
            found = self._checkpoints.last(prompts_per_step)
            if found:
                other = found.world_size != self._ranks.world_size
                ranks = f", which {found.world_size} ranks wrote, with {self._ranks.world_size}" if other else ""
                print(f"resuming from {found.path}{ranks}", flush=True)
        return self._ranks.from_first(found)


def _sender(plan: Plan, client: RolloutClient) -> WeightSender:
    return WeightSender(
        client,
        plan.training.weight_transfer,  # type: ignore[arg-type]  # `adapter` is refused by grpo_arguments
        address=os.environ["MASTER_ADDR"],
        folder=Path(plan.run_dir) / "weights",
    )


def _draws(count: int) -> Dataset:
    """The numbers of all draws of the run, in order, as TRL's prompts: one epoch, never shuffled.

    A text, not a chat, keeps TRL from parsing the completions as messages.
    """
    return Dataset.from_dict({"prompt": [str(draw) for draw in range(count)]})


def _may_hang_for_s(plan: Plan) -> float:
    """How long a server may give no sign of life before it is started again."""
    services = [each for node in plan.nodes for each in node.processes if each.kind == "service"]
    return max((service.alive_within_s for service in services), default=0.0)


def _collective_timeout_s(plan: Plan) -> float:
    """A rank whose rollouts are done waits for those of the others: at most for the slowest rollout and its retries."""
    slowest = max(environment.timeout_s * environment.max_attempts for environment in plan.environments)
    return 1800.0 + 2 * slowest
