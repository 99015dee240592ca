"""A rank of a real training run, with something else than rollout servers behind it.

`train.py RUN_DIR MODE [RECORDS]`. MODE `fixed`: every rollout is derived from its row and its place in the batch. MODE
`fail-in-turn`: the same, and in step k the rollout at place k of the step's only group fails. MODE `vllm:URL` and
`vllm-skip:URL`: a real vLLM, with the second one push of weights is left out. RECORDS: a folder to which each rank
writes what TRL made of every step.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from boundary import OneVllm, Scripted, trajectory

from hpc_gym.protocol.messages import RolloutRequest
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.training import grpo
from hpc_gym.training.policy import PolicyWeights
from hpc_gym.training.trainer import PolicyTrainer

SKIPPED = 3


class Fixed(Scripted):
    """Rollouts that depend on nothing but the row, the rank and the place in the batch. They take `slow` seconds."""

    def __init__(self, rank: int, fail_in_turn: bool) -> None:
        super().__init__(self._rollout, float(os.environ.get("SLOW_ROLLOUTS_S", "0")))
        self._rank = rank
        self._fail_in_turn = fail_in_turn
        self.step = 0

    def run(self, requests: Any, *, weight_version: int = 0, on_progress: Any = None) -> list[Trajectory]:
        self.step = weight_version
        with Path(os.environ["DRAWS"]).with_suffix(f".{self._rank}").open("a") as file:
            file.write(json.dumps([self.step, [request.group for request in requests]]) + "\n")
        return super().run(requests, weight_version=weight_version, on_progress=on_progress)

    def _rollout(self, request: RolloutRequest, index: int) -> Trajectory:
        place = self._rank * int(os.environ["ROWS_PER_RANK"]) + index
        numbers = random.Random(f"{request.row!r} {place}")
        prompt = json.loads(request.row)["prompt"]
        completion = [numbers.randrange(3, 290) for _ in range(numbers.randrange(3, 9))]
        if self._fail_in_turn and place == self.step:
            return Trajectory(index=index, outcome=Outcome.FAILED, reason="the environment is gone")
        return trajectory(index, prompt, completion, reward=numbers.random())


def record_steps(folder: Path, rank: int) -> None:
    """Lets each rank write what TRL made of every step, and the weights it made it with."""
    folder.mkdir(parents=True, exist_ok=True)
    original = PolicyTrainer._generate_and_score_completions

    def recording(self: Any, inputs: Any) -> Any:
        output = original(self, inputs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        rewards = [row["environment_reward"] for row in inputs]
        torch.save(
            {"batch": output, "state": state, "rewards": rewards},
            folder / f"step-{self.state.global_step}-rank-{rank}.pt",
        )
        return output

    PolicyTrainer._generate_and_score_completions = recording  # type: ignore[method-assign]


def leave_out_one_push() -> None:
    original = PolicyWeights.sync_weights

    def skipping(self: PolicyWeights) -> None:
        if self._step() != SKIPPED:
            original(self)

    PolicyWeights.sync_weights = skipping  # type: ignore[method-assign]


def main(run_dir: str, mode: str, records: str = "") -> int:
    rank = int(os.environ["RANK"])
    kind, _, url = mode.partition(":")
    client: Any = OneVllm(url) if url else Fixed(rank, kind == "fail-in-turn")
    if records:
        record_steps(Path(records), rank)
    if kind == "vllm-skip":
        leave_out_one_push()
    grpo.connect = lambda plan: client
    return grpo.main(["--run-dir", run_dir])


if __name__ == "__main__":
    grpo.leave(main(*sys.argv[1:]))
