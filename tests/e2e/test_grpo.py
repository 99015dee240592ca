"""GRPO against a real vLLM: what it samples from is the policy that is trained, at every step, and the check notices
when not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from training_plans import jsonl, run_directory
from training_processes import RankFailed, run_program, start_ranks, vllm_server, wait_ranks

pytestmark = pytest.mark.e2e

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    run_program("models.py", folder / "model", "tied")
    return folder / "model"


@pytest.fixture(scope="module")
def url(folder: Path, model: Path) -> Iterator[str]:
    extension = ["--worker-extension-cls", "hpc_gym.weights.worker.WorkerExtension"]
    with vllm_server(model, folder / "vllm.log", *extension) as address:
        yield address


def train(run: Path, mode: str, expected: int = 0) -> None:
    ranks = start_ranks("train.py", [run, mode], run / "logs", HPC_GYM_ATTEMPT="1")
    wait_ranks(ranks, run / "logs", expected=expected)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_vllm_samples_from_the_trained_policy_at_every_step(
    zero_stage: int, folder: Path, model: Path, url: str
) -> None:
    run = run_directory(
        folder / f"zero-{zero_stage}",
        model,
        steps=STEPS,
        prompts_per_step=4,
        zero_stage=zero_stage,
        weight_transfer="gloo",
        on_policy_tolerance=1e-4,
        wandb={"project": "tests", "mode": "offline", "run_id": "abc123", "name": "run"},
    )
    train(run, f"vllm:{url}")
    lines = jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(0 < line["logp_diff"] < 1e-4 and line["logp_unknown"] == 0 for line in lines)
    assert all(0.99 < line["importance_ratio"] < 1.01 for line in lines)
    # The policy is another one at every step, as the test below shows when a push is left out.
    assert all(line["grad_norm"] > 1e-2 for line in lines)
    assert list(run.glob("wandb/offline-run-*-abc123"))


def test_one_push_left_out_is_noticed(folder: Path, model: Path, url: str) -> None:
    run = run_directory(folder / "skip", model, steps=STEPS, prompts_per_step=4, weight_transfer="gloo")
    train(run, f"vllm-skip:{url}")
    differences = {line["step"]: line["logp_diff"] for line in jsonl(run / "metrics.jsonl")}
    # Step 4 is sampled after three steps of training, with the weights of two.
    assert differences.pop(4) > 1e-2
    assert max(differences.values()) < 1e-4


def test_the_run_stops_where_the_policy_differs(folder: Path, model: Path, url: str) -> None:
    run = run_directory(
        folder / "stopped", model, steps=STEPS, prompts_per_step=4, weight_transfer="gloo", on_policy_tolerance=1e-4
    )
    with pytest.raises(RankFailed, match="OffPolicy: step 4: mean"):
        train(run, f"vllm-skip:{url}")
    assert [line["step"] for line in jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    assert not (run / "model").exists()
