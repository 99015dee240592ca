"""How fast rollouts become arrays in the trainer: hpc-gym's way against parsing NeMo Gym's own JSON there.

Both begin with an environment's answer to `/run` and end with a `Trajectory`, for the same rollouts: 10 turns, 8.6k
tokens.

* Baseline: NeMo Gym returns the token ids with every message (`return_token_id_information: true`), each turn with the
ids of the whole conversation before it, and the trainer parses all of it and takes the arrays out. * hpc-gym: the ids
stay where vLLM's answers arrive. The rollout server takes in the turns, reads the reward, packs the frame; the trainer
unpacks it. The CPU seconds of both processes are counted.

`python benchmarks/trajectories.py` prints the rates and their ratio, and writes them to RESULTS.md.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from results import record

from hpc_gym.protocol import codec
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.rollout.conversation import Conversation
from hpc_gym.rollout.outcomes import read_verdict
from hpc_gym.rollout.replicas import Replica
from hpc_gym.rollout.vllm import Generated, Vllm

TURNS = 10
PROMPT, GENERATED, BETWEEN = 2000, 400, 290
"""Tokens: of the first prompt, of each turn of the policy, and of each of the environment's replies."""
PER_FRAME = 16


@dataclass(frozen=True)
class Rollout:
    """One rollout as each side finds it."""

    turns: list[tuple[list[int], bytes]]
    """The prompt of each turn, and vLLM's answer to it."""
    full_answer: bytes
    """`/run`, with token ids."""
    plain_answer: bytes
    """`/run`, without."""


def make(seed: int) -> Rollout:
    """A rollout with the lengths above and the ids of a vocabulary of 30,000."""
    chance = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [chance.randrange(30_000) for _ in range(count)]

    tokens, turns, full, plain = ids(PROMPT), [], [], []
    for number in range(TURNS):
        generated, logprobs = ids(GENERATED), [round(-chance.random() * 3, 6) for _ in range(GENERATED)]
        content = [
            {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}
            for token, logprob in zip(generated, logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "token_ids": generated,
            "finish_reason": "stop",
            "logprobs": {"content": content},
            "weight_versions": [{"version": "3", "start": 0, "end": GENERATED}],
        }
        turns.append((tokens, json.dumps({"request_id": "x", "choices": [choice]}).encode()))
        call = {
            "type": "function_call",
            "name": "look_up",
            "call_id": f"call{number}",
            "arguments": "x" * 4 * GENERATED,
        }
        reply = {"type": "function_call_output", "call_id": f"call{number}", "output": "y" * 4 * BETWEEN}
        exact = {"prompt_token_ids": tokens, "generation_token_ids": generated, "generation_log_probs": logprobs}
        full += [call | exact, reply]
        plain += [call, reply]
        tokens = tokens + generated + ids(BETWEEN)
    common = {"responses_create_params": {"input": [{"role": "user", "content": "z" * 4 * PROMPT}]}, "score": 0.5}
    return Rollout(
        turns,
        json.dumps(common | {"response": {"output": full}, "reward": 1.0}).encode(),
        json.dumps(common | {"response": {"output": plain}, "reward": 1.0}).encode(),
    )


def from_full_json(answers: list[bytes], loads: Callable[[bytes], Any]) -> list[Trajectory]:
    """The baseline, in the trainer."""
    found = []
    for index, answer in enumerate(answers):
        data = loads(answer)
        items = [item for item in data["response"]["output"] if "generation_token_ids" in item]
        first = items[0]["prompt_token_ids"]
        end = len(first)
        completion: list[int] = []
        mask: list[int] = []
        logprobs: list[float] = []
        for item in items:
            between = item["prompt_token_ids"][end:]
            generated = item["generation_token_ids"]
            completion += between + generated
            mask += [0] * len(between) + [1] * len(generated)
            logprobs += [float("nan")] * len(between) + item["generation_log_probs"]
            end = len(item["prompt_token_ids"]) + len(generated)
        found.append(
            Trajectory(
                index,
                Outcome.OK,
                prompt_ids=np.array(first, np.int32),
                completion_ids=np.array(completion, np.int32),
                policy_mask=np.array(mask, np.uint8),
                logprobs=np.array(logprobs, np.float32),
                weight_versions=np.where(np.array(mask), 3, -1).astype(np.int32),
                reward=data["reward"],
                metrics={"score": data["score"]},
                turns=len(items),
            )
        )
    return found


@dataclass
class Recorded:
    """What a rollout server holds when the environment answers."""

    conversation: Conversation
    answer: bytes


def record_turns(rollouts: list[Rollout]) -> list[Recorded]:
    """The turns of the rollouts, taken in as they come from vLLM."""
    found = []
    for rollout in rollouts:
        conversation = Conversation("tag", Replica(Vllm("vllm-0", "")), "", 0, 0.0)
        for prompt, answer in rollout.turns:
            conversation.add_turn(prompt, msgspec.json.decode(answer, type=Generated).choices[0])
        found.append(Recorded(conversation, rollout.plain_answer))
    return found


def to_frames(recorded: list[Recorded]) -> list[bytes]:
    """The rollout server's part, from the environments' answers to frames."""
    trajectories = []
    for index, one in enumerate(recorded):
        reward, metrics = read_verdict(one.answer)
        trajectories.append(one.conversation.trajectory(index, Outcome.OK, reward=reward, metrics=metrics))
    return [codec.encode(trajectories[at : at + PER_FRAME]) for at in range(0, len(trajectories), PER_FRAME)]


def from_frames(frames: list[bytes]) -> list[Trajectory]:
    """The trainer's part."""
    return [trajectory for frame in frames for trajectory in codec.decode(frame)]


def rate(work: Callable[[], object], count: int, seconds: float = 1.5) -> float:
    """Rollouts per CPU second: the best of several rounds, each of `count` rollouts."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return count / best


def check_equal(ours: list[Trajectory], theirs: list[Trajectory]) -> None:
    """Both ways must give the same arrays."""
    for one, other in zip(ours, theirs, strict=True):
        for name in ("prompt_ids", "completion_ids", "policy_mask", "logprobs", "weight_versions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.reward, one.turns, one.metrics) == (other.reward, other.turns, other.metrics)


def main() -> None:
    rollouts = [make(seed) for seed in range(32)]
    full, recorded = [rollout.full_answer for rollout in rollouts], record_turns(rollouts)
    frames = to_frames(recorded)
    check_equal(from_frames(frames), from_full_json(full, json.loads))
    count = len(rollouts)
    rates = {
        "NeMo Gym's JSON, json": rate(lambda: from_full_json(full, json.loads), count),
        "NeMo Gym's JSON, msgspec": rate(lambda: from_full_json(full, msgspec.json.decode), count),
        "hpc-gym, server and trainer": rate(lambda: from_frames(to_frames(recorded)), count),
        "hpc-gym, trainer alone": rate(lambda: from_frames(frames), count),
    }
    tokens = len(rollouts[0].turns[-1][0]) + GENERATED
    taking_in = rate(lambda: record_turns(rollouts), count)
    base = rates["NeMo Gym's JSON, json"]
    rows = "\n".join(f"| {name} | {value:,.0f} | {value / base:.1f} |" for name, value in rates.items())
    record(
        "Trajectories",
        f"""
{TURNS} turns and {tokens} tokens a rollout. `/run` answers with {len(full[0]) // 1000} kB where they carry token
ids, with {len(recorded[0].answer) // 1000} kB without; a frame takes
{sum(map(len, frames)) // count // 1000} kB per rollout.

| from the environment's answer to arrays in the trainer | rollouts per second and core | ratio |
|---|---|---|
{rows}

Not counted on either side: taking in vLLM's answers turn by turn while the rollout runs
(ours: {taking_in:,.0f} rollouts per second and core).
""",
    )


if __name__ == "__main__":
    main()
