"""The training ranks on the real TRL and DeepSpeed: exact resume, also by other ranks, stop at a checkpoint, export,
failed rollouts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_plans import ROWS as ROWS_PER_ENVIRONMENT
from training_plans import copy_of, jsonl, on_other_ranks, run_directory
from training_processes import json_lines, run_program, runtime_python, start_ranks, wait_ranks

pytestmark = pytest.mark.e2e

STEPS = 6
ROWS_PER_RANK = 4
"""Two prompts of four rollouts each, over two ranks: a whole group per rank."""

FALLING = {"lr_scheduler_type": "linear"}
"""A learning rate that tells in which step of how many it is."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tied"
    run_program("models.py", folder, "tied")
    return folder


def begin(run: Path, attempt: int, mode: str = "fixed", records: str = "", ranks: int = 2, **env: str) -> list[Any]:
    variables = {
        "HPC_GYM_ATTEMPT": str(attempt),
        "DRAWS": str(run / "draws"),
        "ROWS_PER_RANK": str(2 * ROWS_PER_RANK // ranks),
        **env,
    }
    return start_ranks("train.py", [run, mode, records], run / "logs", ranks, **variables)


def train(run: Path, attempt: int = 1, mode: str = "fixed", records: str = "", ranks: int = 2, **env: str) -> None:
    wait_ranks(begin(run, attempt, mode, records, ranks, **env), run / "logs")


def stop_at(run: Path, step: int) -> None:
    """Runs until that step has been trained, asks all ranks to stop in the middle of the next one's rollouts."""
    stop_when(run, lambda: any(line["step"] == step for line in jsonl(run / "metrics.jsonl")))


def stop_when(run: Path, moment: Callable[[], bool]) -> None:
    """Runs until then, and asks all ranks to stop half a second later; rollouts take one and a half."""
    ranks = begin(run, 1, SLOW_ROLLOUTS_S="1.5")
    end = time.monotonic() + 120
    while not moment() and time.monotonic() < end:
        assert all(rank.poll() is None for rank in ranks), (run / "logs" / "rank-0.log").read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(0.5)
    asked = time.monotonic()
    for rank in ranks:
        os.kill(rank.pid, signal.SIGUSR2)
    wait_ranks(ranks, run / "logs", expected=85)
    assert time.monotonic() - asked < 15


def draws(run: Path) -> dict[tuple[int, int], list[int]]:
    """The draws of each step on each rank, as they were asked for last."""
    return {(rank, step): groups for rank in (0, 1) for step, groups in jsonl(run / f"draws.{rank}")}


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in one piece, with ZeRO-2."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run = run_directory(folder, model, steps=STEPS, prompts_per_step=2, checkpoint_every=2, evaluate=True, grpo=FALLING)
    train(run)
    return run


def test_metrics_have_one_line_per_step(straight: Path) -> None:
    lines = jsonl(straight / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        # One draw of each environment per step: the mixture is even.
        assert line["reward"] == pytest.approx((line["reward/alpha"] + line["reward/beta"]) / 2)
        assert line["rollouts"] == 8 and line["failed"] == 0 and line["tokens"] > 20
        assert line["attempt"] == 1 and line["max_steps"] == STEPS and line["step_seconds"] > 0


def test_evaluation_before_and_after_over_the_same_rows(straight: Path) -> None:
    before, after = jsonl(straight / "evaluations.jsonl")
    assert (before["when"], before["step"], after["when"], after["step"]) == ("before", 0, "after", STEPS)
    for record in (before, after):
        assert {name: len(rewards) for name, rewards in record["rewards"].items()} == {"alpha": 12, "beta": 12}
    # The script's rewards do not depend on the weights, so pairing by row shows as equality.
    assert before["rewards"] == after["rewards"]


def test_checkpoints_are_whole_and_two_are_kept(straight: Path) -> None:
    names = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert names == ["checkpoint-4", "checkpoint-6"]
    assert all((straight / "checkpoints" / name / "complete.json").exists() for name in names)


def test_the_export_loads_and_has_changed(straight: Path, model: Path) -> None:
    facts = json_lines(run_program("exported.py", straight / "model", model))[0]
    assert facts["dtype"] == "torch.float32"
    assert facts["chat"] == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert facts["distances"][0] > 1e-3
    assert not list(straight.glob("model.partial"))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    zero_stage: int, straight: Path, model: Path, tmp_path: Path
) -> None:
    run = copy_of(straight, tmp_path / "resumed")
    if zero_stage == 3:
        run = run_directory(
            tmp_path / "resumed-3", model, steps=STEPS, prompts_per_step=2, zero_stage=3, evaluate=True, grpo=FALLING
        )
    stop_at(run, 3)
    assert not (run / "model").exists()
    assert (run / "checkpoints" / "checkpoint-3" / "complete.json").exists()
    torn = run / "checkpoints" / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 5}')
    train(run, attempt=2)
    assert not torn.exists()
    assert [(line["attempt"], line["step"]) for line in jsonl(run / "metrics.jsonl")] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 5),
        (2, 6),
    ]
    assert [(line["attempt"], line["when"]) for line in jsonl(run / "evaluations.jsonl")] == [
        (1, "before"),
        (2, "after"),
    ]
    assert draws(run) == draws(straight)
    facts = json_lines(run_program("exported.py", run / "model", straight / "model"))[0]
    assert facts["distances"][0] < 1e-6


@pytest.mark.parametrize(("zero_stage", "ranks", "steps"), [(2, 4, STEPS), (3, 1, STEPS + 1)])
def test_other_ranks_go_on_as_if_they_had_always_been_there(
    zero_stage: int, ranks: int, steps: int, straight: Path, model: Path, tmp_path: Path
) -> None:
    """From step 4 of six: a step takes the same rows, and finds the same loss, gradient and learning rate. And the run
    may become longer.
    """
    before = straight
    if zero_stage == 3:
        before = run_directory(
            tmp_path / "before", model, steps=STEPS, prompts_per_step=2, checkpoint_every=2, zero_stage=3
        )
        train(before)
    run = on_other_ranks(before, tmp_path / "after", ranks, from_step=4, steps=steps)
    train(run, attempt=2, ranks=ranks)
    expected, found = jsonl(before / "metrics.jsonl")[4:], jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(5, steps + 1))
    for line, other in zip(found, expected, strict=False):
        for name in ("reward", "reward_std", "tokens", "completion_tokens", "learning_rate"):
            assert line[name] == pytest.approx(other[name], rel=1e-6), name
        for name in ("loss", "grad_norm", "entropy"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    rows = {step: sorted(groups) for step, groups in rows_of_steps(run, ranks).items() if step < STEPS}
    assert rows == {step: groups for step, groups in rows_of_steps(before, 2).items() if 4 <= step < STEPS}
    marker = json.loads((run / "checkpoints" / "checkpoint-6" / "complete.json").read_text())
    assert (marker["step"], marker["world_size"], marker["draws"]) == (6, ranks, 12)
    assert marker["seconds"] > 0 and marker["bytes"]["model.safetensors"] > 0 and len(marker["bytes"]) > 2 * ranks
    if steps == STEPS:
        facts = json_lines(run_program("exported.py", run / "model", before / "model"))[0]
        assert facts["distances"][0] < 1e-5


def test_a_stop_in_an_evaluation_loses_no_step(model: Path, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", model, steps=3, evaluate=True, evaluate_every=2)
    rows = 2 * ROWS_PER_ENVIRONMENT * 2
    stop_when(run, lambda: [2, rows] in [[step, len(groups)] for step, groups in jsonl(run / "draws.0")])
    train(run, attempt=2)
    assert [(line["attempt"], line["step"]) for line in jsonl(run / "metrics.jsonl")] == [(1, 1), (1, 2), (2, 3)]
    evaluated = [(line["attempt"], line["when"], line["step"]) for line in jsonl(run / "evaluations.jsonl")]
    assert evaluated == [(1, "before", 0), (2, "step", 2), (2, "after", 3)]


def test_what_a_checkpoint_has_is_at_wandb_whatever_is_killed_then(model: Path, tmp_path: Path) -> None:
    wandb = {"project": "tests", "mode": "offline", "run_id": "killed"}
    run = run_directory(tmp_path / "run", model, steps=STEPS, checkpoint_every=2, wandb=wandb)
    ranks = begin(run, 1)
    end = time.monotonic() + 120
    while not (run / "checkpoints" / "checkpoint-4" / "complete.json").exists():
        assert time.monotonic() < end and all(rank.poll() is None for rank in ranks)
        time.sleep(0.005)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    files = [str(path) for path in run.glob("wandb/offline-run-*/*.wandb")]
    program = Path(__file__).parents[1] / "slurm" / "wandb_rows.py"
    told = subprocess.run([str(runtime_python("train-cpu")), str(program), *files], capture_output=True, text=True)
    steps = [line["step"] for line in json_lines(told.stdout) if "train/loss" in line]
    assert steps[:4] == [1, 2, 3, 4]


def rows_of_steps(run: Path, ranks: int) -> dict[int, list[int]]:
    """The draws of each step over all ranks, in order."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for step, groups in jsonl(run / f"draws.{rank}"):
            found.setdefault(step, []).extend(groups)
    return {step: sorted(groups) for step, groups in found.items()}


def test_a_run_that_only_lacks_its_export_is_finished(straight: Path) -> None:
    shutil.move(straight / "model", straight / "first-model")
    train(straight, attempt=2)
    assert len(jsonl(straight / "metrics.jsonl")) == STEPS
    assert len(jsonl(straight / "evaluations.jsonl")) == 2
    facts = json_lines(run_program("exported.py", straight / "model", straight / "first-model"))[0]
    assert facts["distances"] == [0.0]


def test_a_failed_rollout_is_left_out_wherever_it_stands(model: Path, tmp_path: Path) -> None:
    """One group of four rollouts, two on each rank; in step k the one at place k fails, in the fifth step none."""
    descent = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0, "loss_type": "dapo"}
    run = run_directory(tmp_path / "failing", model, steps=6, grpo=descent)
    train(run, mode="fail-in-turn", records=str(tmp_path / "records"), ROWS_PER_RANK="2")
    lines = json_lines(run_program("arithmetic.py", tmp_path / "records", model, 6))
    assert [line["rewards"].index(None) for line in lines[:4]] == [0, 1, 2, 3]
    for line in lines:
        assert line["advantages"] == pytest.approx(line["by_hand"], abs=1e-5)
        assert line["gradient_error"] < 1e-5 < 1e-2 < line["gradient"]
        for reward, advantage, tokens in zip(line["rewards"], line["advantages"], line["trained_tokens"], strict=True):
            assert (reward is None) == (advantage == 0.0) == (tokens == 0)
    assert [line["failed"] for line in jsonl(run / "metrics.jsonl")] == [1, 1, 1, 1, 0, 0]
