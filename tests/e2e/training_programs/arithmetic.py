"""Compares what TRL and DeepSpeed made of each step's rollouts with the arithmetic written out: `arithmetic.py RECORDS
MODEL STEPS`.

Advantages: (reward - mean) / (standard deviation + 1e-4), over the group's rollouts that did not fail. Gradient: that
of -sum(advantage x log p(token)) / number of tokens, over the tokens of those rollouts (TRL's `dapo` loss at ratio 1),
as seen in the difference that a step of plain gradient descent with learning rate 1 makes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def advantages_by_hand(rewards: list[float | None]) -> list[float]:
    scored = [reward for reward in rewards if reward is not None]
    mean = sum(scored) / len(scored)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in scored) / (len(scored) - 1))
    return [0.0 if reward is None else (reward - mean) / (deviation + 1e-4) for reward in rewards]


def gradient_by_hand(model: Any, ranks: list[dict[str, Any]], advantages: list[float]) -> dict[str, torch.Tensor]:
    """`ranks`: TRL's batches. Rows that failed are left out here, not masked."""
    model.zero_grad()
    total, tokens, row = 0.0, 0, 0
    for batch in (rank["batch"] for rank in ranks):
        for i in range(len(batch["prompt_ids"])):
            if ranks[row // len(batch["prompt_ids"])]["rewards"][i] is not None:
                prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
                completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
                logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
                logps = torch.log_softmax(logits, -1)[range(len(completion)), completion]
                total = total - advantages[row] * logps.sum()
                tokens += len(completion)
            row += 1
    (total / tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main(records: str, folder: str, steps: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for step in range(steps - 1):
        ranks = [torch.load(Path(records) / f"step-{step}-rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
        after = torch.load(Path(records) / f"step-{step + 1}-rank-0.pt", weights_only=False)["state"]
        before = ranks[0]["state"]
        rewards = [reward for rank in ranks for reward in rank["rewards"]]
        found = torch.cat([rank["batch"]["advantages"] for rank in ranks]).tolist()
        expected = advantages_by_hand(rewards)
        model.load_state_dict(before, strict=False)
        by_hand = gradient_by_hand(model, ranks, expected)
        made = {name: before[name] - after[name] for name in by_hand}
        masked = [
            int((rank["batch"]["completion_mask"] * rank["batch"]["tool_mask"])[i].sum())
            for rank in ranks
            for i in range(len(rank["rewards"]))
        ]
        print(
            json.dumps(
                {
                    "step": step,
                    "rewards": rewards,
                    "advantages": found,
                    "by_hand": expected,
                    "trained_tokens": masked,
                    "gradient": max(tensor.abs().max().item() for tensor in by_hand.values()),
                    "gradient_error": max((made[n] - by_hand[n]).abs().max().item() for n in by_hand),
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
