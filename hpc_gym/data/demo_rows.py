"""The demo's rows: questions for two environments that ship with NeMo Gym, and which of them are held out.

* `reasoning_gym`: chain_sum with three one-digit terms, in the row format of the environment's own `example.jsonl`. All
  4,000 questions that exist: reasoning-gym 0.1.25 draws with repetition, so two seeds of its generator would overlap.
* `example_session_state_mgmt`: "add X then add Y then get the count" over a counter that the environment keeps, X and Y
  from 1 to 30, starting at 0 to 20.

Everything here follows from a seed: which questions are held out, the order of the rows, and where the counters start.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A NeMo Gym dataset row: `responses_create_params`, the verifier's own fields, and `agent_ref`."""

CHAIN_SUM = "reasoning_gym"
COUNTER = "example_session_state_mgmt"
ENVIRONMENTS = (CHAIN_SUM, COUNTER)
HELD_OUT = 200
"""Rows per environment that neither the warm start nor the training sees."""

LARGEST_SUMMAND = 30
LARGEST_START = 20

COUNTER_TOOLS: tuple[dict[str, Any], ...] = (
    {
        "name": "increment_counter",
        "parameters": {
            "type": "object",
            "properties": {"count": {"type": "integer", "description": ""}},
            "required": ["count"],
            "additionalProperties": False,
        },
        "strict": True,
        "type": "function",
        "description": "",
    },
    {
        "name": "get_counter_value",
        "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        "strict": True,
        "type": "function",
        "description": "",
    },
)
"""As in the environment's `data/example.jsonl` (nemo-gym 0.4.0)."""


@dataclass(frozen=True)
class Split:
    """Rows of one environment; no question is in both."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


def question(row: Row) -> str:
    """What the row asks the policy."""
    text: str = row["responses_create_params"]["input"][0]["content"]
    return text


def split(environment: str, seed: int) -> Split:
    """All rows of that environment in an order drawn from `seed`; the first HELD_OUT of them are held out."""
    # A string seeds `random.Random` by its SHA-512, the same in every process and version (unlike `hash`).
    rng = random.Random(f"hpc-gym demo {environment} {seed}")
    rows = _chain_sum_rows() if environment == CHAIN_SUM else _counter_rows(rng)
    rng.shuffle(rows)
    return Split(train=tuple(rows[HELD_OUT:]), held_out=tuple(rows[:HELD_OUT]))


def write(folder: Path, seed: int) -> None:
    """Writes `ENVIRONMENT-train.jsonl` and `ENVIRONMENT-held-out.jsonl` into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for environment in ENVIRONMENTS:
        rows = split(environment, seed)
        write_rows(folder / f"{environment}-train.jsonl", rows.train)
        write_rows(folder / f"{environment}-held-out.jsonl", rows.held_out)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a JSONL file of rows in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


def _chain_sum_rows() -> list[Row]:
    digits, signs = range(10), "+-"
    rows = []
    for index, (a, first, b, second, c) in enumerate(itertools.product(digits, signs, digits, signs, digits)):
        expression = f"{a} {first} {b} {second} {c}"
        text = f"State the final answer to the following arithmetic problem: {expression} ="
        total = a + (b if first == "+" else -b) + (c if second == "+" else -c)
        rows.append(
            {
                "responses_create_params": {"input": [{"role": "user", "content": text}]},
                "question": text,
                "answer": str(total),
                "metadata": {
                    "source_dataset": "chain_sum",
                    "source_index": index,
                    "num_terms": 3,
                    "num_digits": 1,
                    "expression": expression,
                    "difficulty": {"num_terms": [3, 3], "num_digits": [1, 1]},
                },
                "agent_ref": _agent(CHAIN_SUM),
            }
        )
    return rows


def _counter_rows(rng: random.Random) -> list[Row]:
    summands = range(1, LARGEST_SUMMAND + 1)
    rows = []
    for x, y in itertools.product(summands, summands):
        start = rng.randint(0, LARGEST_START)
        text = f"add {x} then add {y} then get the count"
        rows.append(
            {
                "responses_create_params": {
                    "input": [{"content": text, "role": "user"}],
                    "tools": list(COUNTER_TOOLS),
                },
                "expected_count": start + x + y,
                "initial_count": start,
                "agent_ref": _agent(COUNTER),
            }
        )
    return rows


def _agent(environment: str) -> dict[str, str]:
    return {"type": "responses_api_agents", "name": f"{environment}_simple_agent"}
