"""Sends weights into a running `vllm serve` in several ways and compares its log-probabilities with transformers' own.

`weights.py URL MODEL tied|untied`, prints one JSON line per scenario.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from boundary import OneVllm, post
from transformers import AutoModelForCausalLM

from hpc_gym.training.grpo import leave
from hpc_gym.weights.sender import WeightSender, WeightTransferError
from hpc_gym.weights.wire import TensorSpec

PROMPTS = [list(range(3 + 7 * n, 15 + 7 * n)) for n in range(8)]
TOKENS = 12


def changed(original: Any, seed: int) -> Any:
    """The model with other weights: what training might have made of it."""
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.std().nan_to_num(0.05))
    return model


@torch.no_grad()
def compare(vllm: OneVllm, model: Any) -> dict[str, float]:
    """Greedy completions of vLLM: the largest difference of a log-probability, and the share that the model would
    choose.
    """
    worst, same, count = 0.0, 0, 0
    for prompt in PROMPTS:
        answer = vllm.complete(prompt, TOKENS, temperature=0.0)
        ids = answer["token_ids"]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1)[range(len(ids)), ids]
        worst = max(worst, (expected - torch.tensor(answer["logprobs"]["token_logprobs"])).abs().max().item())
        same += int((logits.argmax(-1) == torch.tensor(ids)).sum())
        count += len(ids)
    return {"logp_diff": worst, "greedy_same": same / count}


def specs_of(model: Any) -> list[TensorSpec]:
    return [TensorSpec(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()]


def breaking(model: Any, after: int) -> Iterator[tuple[str, torch.Tensor]]:
    for number, named in enumerate(model.named_parameters()):
        if number == after:
            raise RuntimeError("the trainer broke off")
        yield named


def main(url: str, folder: str, kind: str) -> None:
    began = time.monotonic()
    vllm = OneVllm(url)
    storage = Path(tempfile.mkdtemp())

    def sender(**settings: Any) -> WeightSender:
        transport = settings.pop("transport", "gloo")
        return WeightSender(vllm, transport, address="127.0.0.1", folder=storage, **settings)  # type: ignore[arg-type]

    def say(scenario: str, **facts: Any) -> None:
        print(json.dumps({"scenario": scenario, "at": round(time.monotonic() - began, 2), **facts}), flush=True)

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    say("loaded", **compare(vllm, original))
    say("before an update", **compare(vllm, changed(original, 1)))

    gloo = sender()
    for seed in (1, 2):
        model = changed(original, seed)
        started = time.monotonic()
        gloo.send(specs_of(model), model.named_parameters(), seed)
        say(f"gloo {seed}", seconds=time.monotonic() - started, **compare(vllm, model))

    small = sender(bucket_bytes=9000)
    model = changed(original, 3)
    small.send(specs_of(model), model.named_parameters(), 3)
    say("small buckets, a new group", **compare(vllm, model))

    disk = sender(transport="filesystem", bucket_bytes=100_000)
    model = changed(original, 4)
    disk.send(specs_of(model), model.named_parameters(), 4)
    left = sorted(path.name for path in storage.iterdir())
    say("filesystem", left=left, **compare(vllm, model))

    small = sender(bucket_bytes=9000)  # the folder's settings replaced the group
    model = changed(original, 5)
    small.send(specs_of(original), original.named_parameters(), 4)
    started = time.monotonic()
    try:
        small.send(specs_of(model), breaking(model, 7), 5)
    except WeightTransferError as error:
        say("broken off", error=str(error), seconds=time.monotonic() - started)
    small.send(specs_of(model), model.named_parameters(), 5)
    say("after one that broke off", **compare(vllm, model))

    renamed = [(name.replace("input_layernorm", "no_such_layer"), p) for name, p in model.named_parameters()]
    started = time.monotonic()
    try:
        small.send([TensorSpec(n, p.dtype, tuple(p.shape)) for n, p in renamed], iter(renamed), 6)
    except WeightTransferError as error:
        say("refused by vLLM", error=str(error), seconds=time.monotonic() - started)
    model = changed(original, 6)
    small.send(specs_of(model), model.named_parameters(), 6)
    say("after one that was refused", **compare(vllm, model))

    post(url + "/collective_rpc", {"method": "repack_lm_heads", "args": [False]})
    gloo = sender()
    model = changed(original, 7)
    gloo.send(specs_of(model), model.named_parameters(), 7)
    say("without repacking", **compare(vllm, model))
    post(url + "/collective_rpc", {"method": "repack_lm_heads", "args": [True]})
    gloo.send(specs_of(model), model.named_parameters(), 8)
    say("with repacking again", **compare(vllm, model))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
