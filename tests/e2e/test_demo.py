"""The demo as a user runs it, with few steps: real vLLM, NeMo Gym, TRL and DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_gym.data.demo_rows import ENVIRONMENTS
from hpc_gym.jobs import local
from hpc_gym.jobs.demo_inputs import TRAIN_RUNTIME
from hpc_gym.jobs.records import JobRecord
from hpc_gym.protocol.attempt import Outcome
from hpc_gym.runtimes.spec import spec_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS, EVAL_ROWS = 4, 16
DEMO = [sys.executable, "-m", "hpc_gym.cli.main", "demo", "--seed", "0", "--run-name", "small"]
DEMO += ["--steps", str(STEPS), "--eval-rows", str(EVAL_ROWS)]
LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
chat = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 1 + 2 + 3 ="}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
said = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0][prompt["input_ids"].shape[1]:]
print(json.dumps([tokenizer.decode(said), model.num_parameters()]))
"""


def environment(folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {"XDG_STATE_HOME": str(folder / "state")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run directory of a demo that ran to its end."""
    folder = tmp_path_factory.mktemp("demo")
    run_dir = folder / "runs" / "small"
    command = [*DEMO, f"cluster.runs_dir={folder / 'runs'}"]
    try:
        ran = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=540)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        (folder / "stdout").write_text(ran.stdout)
        assert local.processes(JobRecord.read(run_dir)) == []
        yield run_dir
    finally:
        if (run_dir / "job.json").exists():
            local.kill(JobRecord.read(run_dir))


def test_it_says_what_it_reached_and_where(finished: Path) -> None:
    said = (finished.parent.parent / "stdout").read_text()
    for words in (*ENVIRONMENTS, "together", str(finished / "reward-curve.png"), "log p(vLLM)"):
        assert words in said
    assert (finished / "reward-curve.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    assert report["steps"] == STEPS
    assert {each["name"]: each["gain"]["rows"] for each in report["environments"]} == dict.fromkeys(
        ENVIRONMENTS, EVAL_ROWS
    )


def test_every_step_trains_on_what_the_same_policy_said(finished: Path) -> None:
    steps = lines(finished / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert step["logp_diff"] <= 1e-4
        assert step["logp_unknown"] == 0
        assert step["failed"] == 0
        # Every rollout of the counter takes several turns; a contiguity error would fail it.
        assert step["turns"] > step["rollouts"] == 96
        assert {f"reward/{name}" for name in ENVIRONMENTS} <= step.keys()


def test_both_evaluations_ran_on_the_same_rows(finished: Path) -> None:
    evaluations = lines(finished / "evaluations.jsonl")
    assert [each["when"] for each in evaluations] == ["before", "after"]
    for each in evaluations:
        assert {name: len(rewards) for name, rewards in each["rewards"].items()} == dict.fromkeys(
            ENVIRONMENTS, EVAL_ROWS
        )
        assert each["failed"] == 0


def test_the_trained_model_is_an_ordinary_one(finished: Path) -> None:
    """Loads in transformers alone, answers, and is not the model that training began with."""
    python = spec_of(TRAIN_RUNTIME).python
    command = [str(python), "-c", LOAD, str(finished / "model")]
    loaded = subprocess.run(command, env=environment(finished), capture_output=True, text=True, timeout=120, check=True)
    said, parameters = json.loads(loaded.stdout.splitlines()[-1])
    assert said.endswith("<|im_end|>")
    assert 200_000 < parameters < 5_000_000
    started_from = Path(json.loads((finished / "plan.json").read_text())["training"]["model"])
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (started_from, finished / "model"))
    assert before != after


def test_the_run_directory_tells_the_whole_story(finished: Path) -> None:
    for name in ("experiment.yaml", "plan.json", "job.sh", "manifest.json", "code/hpc_gym", "checkpoints", "wandb"):
        assert (finished / name).exists(), name
    outcome = Outcome.read(finished / "attempts" / "latest")
    assert outcome is not None
    assert outcome.kind == "completed"
    logs = {path.name for path in (finished / "attempts" / "1" / "logs").iterdir()}
    assert {"rollout-0-vllm-0.log", "rollout-0-gym.log", "train-0-rank-0.log", "train-1-rank-1.log"} <= logs


def test_an_interrupt_leaves_nothing_running(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "small"
    command = [*DEMO, f"cluster.runs_dir={tmp_path / 'runs'}"]
    shared_memory = set(Path("/dev/shm").iterdir())
    demo = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "attempts" / "1" / "logs" / "rollout-0-gym.log").exists():
            assert demo.poll() is None, demo.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # In the midst of the start: vLLM and Ray have processes of their own by then.
        time.sleep(8)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130
        assert local.processes(JobRecord.read(run_dir)) == []
        assert set(Path("/dev/shm").iterdir()) <= shared_memory
    finally:
        demo.kill()
        if (run_dir / "job.json").exists():
            local.kill(JobRecord.read(run_dir))
