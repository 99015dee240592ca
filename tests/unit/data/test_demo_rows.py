"""The demo's rows: right answers, in the environments' format, and nothing that is held out is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpc_gym.data import demo_rows
from hpc_gym.data.demo_rows import CHAIN_SUM, COUNTER, ENVIRONMENTS


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_no_held_out_question_is_trained_on(environment: str, seed: int) -> None:
    rows = demo_rows.split(environment, seed)
    held_out = {demo_rows.question(row) for row in rows.held_out}
    train = {demo_rows.question(row) for row in rows.train}
    assert len(held_out) == len(rows.held_out) == demo_rows.HELD_OUT
    assert len(train) == len(rows.train) == {CHAIN_SUM: 3800, COUNTER: 700}[environment]
    assert not held_out & train


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_split_follows_from_the_seed(environment: str) -> None:
    assert demo_rows.split(environment, 3) == demo_rows.split(environment, 3)
    first, second = (demo_rows.split(environment, seed).held_out for seed in (3, 4))
    assert [demo_rows.question(row) for row in first] != [demo_rows.question(row) for row in second]


def test_chain_sum_answers_are_right() -> None:
    for row in demo_rows.split(CHAIN_SUM, 0).held_out:
        expression = row["metadata"]["expression"]
        assert re.fullmatch(r"\d [+-] \d [+-] \d", expression)
        assert row["answer"] == str(eval(expression))
        assert row["question"] == demo_rows.question(row)
        assert row["question"].endswith(f": {expression} =")


def test_counter_rows_expect_the_sum() -> None:
    rows = demo_rows.split(COUNTER, 0)
    for row in rows.train:
        x, y = (int(number) for number in re.findall(r"\d+", demo_rows.question(row)))
        assert row["expected_count"] == row["initial_count"] + x + y
        assert 0 <= row["initial_count"] <= demo_rows.LARGEST_START


def test_files_hold_the_rows_and_name_their_agents(tmp_path: Path) -> None:
    demo_rows.write(tmp_path / "data", seed=5)
    for environment in ENVIRONMENTS:
        expected = demo_rows.split(environment, 5)
        for name, rows in (("train", expected.train), ("held-out", expected.held_out)):
            text = (tmp_path / "data" / f"{environment}-{name}.jsonl").read_text()
            assert tuple(json.loads(line) for line in text.splitlines()) == rows
            assert {row["agent_ref"]["name"] for row in rows} == {f"{environment}_simple_agent"}
    assert len(list((tmp_path / "data").iterdir())) == 4
