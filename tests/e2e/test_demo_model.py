"""The demo's model, tokenizer and chat template, in the train runtime that makes them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc_gym.jobs.demo_inputs import TRAIN_RUNTIME, DemoInputs, ModelMaking
from hpc_gym.runtimes.spec import spec_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).resolve().parents[2]
LOOK = """
import json, random, torch
from hpc_gym.data import demo_rows
from hpc_gym.training import demo_model as demo
rng, recipe = random.Random(0), demo.Recipe(steps=2, chain_sum_per_step=8, counter_per_step=4)
chats = [chat for name in demo_rows.ENVIRONMENTS for chat in demo.draw(name, 100, 0.5, 0, rng)]
tokenizer = demo.make_tokenizer(chats, recipe.vocabulary)
found = {"vocabulary": len(tokenizer), "prompts": {}, "spoken": {}, "turns_contiguous": True, "decodes": True}
for name in demo_rows.ENVIRONMENTS:
    row = demo_rows.split(name, 0).held_out[0]
    chat = demo.demonstration(row, careless=False, start=3)
    batch = demo.encode(tokenizer, [(row, chat)])
    offered = demo.tools(row)
    prompt = tokenizer.apply_chat_template(chat[:1], tools=offered, add_generation_prompt=True, return_dict=False)
    whole = batch.ids[0].tolist()
    found["prompts"][name] = len(prompt)
    found["turns_contiguous"] &= whole[:len(prompt)] == prompt
    found["spoken"][name] = tokenizer.decode(batch.labels[0][batch.labels[0] != demo.IGNORED])
    text = tokenizer.apply_chat_template(chat, tools=offered, tokenize=False)
    found["decodes"] &= tokenizer.decode(whole) == text
torch.manual_seed(0)
model = demo.make_model(tokenizer, recipe)
start = demo.WarmStart(model, tokenizer, recipe, 0)
found["losses"] = [start.step(step) for step in range(recipe.steps)]
found["model_vocabulary"] = model.config.vocab_size
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [str(spec_of(TRAIN_RUNTIME).python), "-c", LOOK]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return said


def test_the_preamble_for_tools_is_a_few_tokens(found: dict[str, Any]) -> None:
    assert found["prompts"] == {"reasoning_gym": 12, "example_session_state_mgmt": 24}


def test_only_the_policys_turns_are_learnt(found: dict[str, Any]) -> None:
    call = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call><|im_end|>'
    counter = found["spoken"]["example_session_state_mgmt"]
    assert len([turn for turn in counter.split("<|im_end|>") if turn]) == 4
    assert counter.count("increment_counter") == 2
    assert call.format("get_counter_value", "{}") in counter
    assert "tool_response" not in counter
    assert found["spoken"]["reasoning_gym"].removesuffix("<|im_end|>").lstrip("-").isdigit()


def test_the_tokenizer_loses_nothing_and_prompts_end_on_a_token(found: dict[str, Any]) -> None:
    assert found["decodes"]
    assert found["turns_contiguous"]


def test_the_model_has_no_token_that_decodes_to_nothing(found: dict[str, Any]) -> None:
    assert found["model_vocabulary"] == found["vocabulary"] < 700
    assert all(0 < loss < 20 for loss in found["losses"])


def test_a_cancelled_making_leaves_no_model_and_no_program(tmp_path: Path) -> None:
    inputs = DemoInputs(tmp_path / "inputs", seed=0)
    making = ModelMaking(inputs, threads=1, progress=lambda said: None)
    making.start()
    making.cancel()
    assert not inputs.has_model
    left = subprocess.run(["pgrep", "-f", str(inputs.model)], capture_output=True, text=True)
    assert left.stdout == ""
