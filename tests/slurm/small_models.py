"""Makes a policy and a judge for five environments: small Qwen3s that learnt nemo-gym's example rows by heart, half of
them with wrong answers, so that rewards vary and the judge has something to tell apart.

usage (train runtime): small_models.py FOLDER NEMO_GYM_SITE_PACKAGES
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from hpc_gym.training.demo_model import IGNORED, Batch, Message, Recipe, Row, encode, make_model, make_tokenizer

POLICY_STEPS, JUDGE_STEPS = 80, 80
RECIPE = Recipe(hidden_size=64, intermediate_size=192, context=4096, vocabulary=4096)
Chat = tuple[Row, list[Message]]

# As `math_with_judge` of nemo-gym 0.4.0 asks its judge (`resources_servers/math_with_judge/app.py`), and
# `equivalence_llm_judge` with its own template; a judge that is asked otherwise says anything, which counts as
# "different".
VERDICTS = ("[[A=B]]", "[[A!=B]]")
QUESTION = (
    "<|Problem|>\n{question}\n\n<|Start of Assistant A's Answer|>\n{first}\n<|End of Assistant A's Answer|>\n\n"
    "<|Start of Assistant B's Answer|>\n{second}\n<|End of Assistant B's Answer|>"
)
IN_WORDS, WRONG = "It is what it should be.", "I would rather not say."


def conversation(row: Row, *answers: Message) -> Chat:
    return row, [*row["responses_create_params"]["input"], *answers]


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def called(name: str, arguments: str) -> Message:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def office(row: Row) -> list[Chat]:
    """The calls that solve the task; or a look into the directory, and that was that."""
    right: list[Message] = []
    for call in row["ground_truth"]:
        right += [called(call["name"], call["arguments"]), {"role": "tool", "content": '{"output":"Done."}'}]
    found = {"role": "tool", "content": '{"output":["raj.patel@atlas.com"]}'}
    wrong = [called("company_directory_find_email_address", '{"name": "Raj"}'), found]
    return [conversation(row, *right, said("Done.")), conversation(row, *wrong, said("Done."))]


def puzzle(row: Row) -> list[Chat]:
    return [conversation(row, said(row["answer"])), conversation(row, said(WRONG))]


def choice(row: Row) -> list[Chat]:
    other = "A" if row["expected_answer"] != "A" else "B"
    return [conversation(row, said(f"\\boxed{{{letter}}}")) for letter in (row["expected_answer"], other)]


def mathematics(row: Row) -> list[Chat]:
    """Boxed and right, which needs no judge; right in words, which only the judge knows; and no answer."""
    answers = (boxed(row), IN_WORDS, WRONG)
    return [conversation(row, said(answer)) for answer in answers]


def short_answer(row: Row) -> list[Chat]:
    return [conversation(row, said(answer)) for answer in (boxed(row), WRONG)]


def boxed(row: Row) -> str:
    return f"\\boxed{{{row['expected_answer']}}}"


def equivalence(row: Row, template: str) -> list[Chat]:
    (asked,) = row["responses_create_params"]["input"]
    chats = []
    for answer, verdict in zip((boxed(row), WRONG), VERDICTS, strict=True):
        text = template.format(
            question=asked["content"], expected_answer=row["expected_answer"], generated_answer=answer
        )
        chats.append(({"responses_create_params": {}}, [{"role": "user", "content": text}, said(verdict)]))
    return chats


def judgement(row: Row, system: str) -> list[Chat]:
    chats = []
    for answer, verdict in zip((IN_WORDS, WRONG), VERDICTS, strict=True):
        for pair in ((row["expected_answer"], answer), (answer, row["expected_answer"])):
            asked = QUESTION.format(question=row["question"], first=pair[0], second=pair[1])
            messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}, said(verdict)]
            chats.append(({"responses_create_params": {}}, messages))
    return chats


DEMONSTRATIONS = {
    "workplace_assistant": office,
    "reasoning_gym": puzzle,
    "mcqa": choice,
    "math_with_judge": mathematics,
    "equivalence_llm_judge": short_answer,
}


def rows(packages: Path, environment: str) -> list[Row]:
    """The rows that nemo-gym ships for it."""
    path = packages / "resources_servers" / environment / "data" / "example.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge_system(packages: Path) -> str:
    """What `math_with_judge` tells its judge before it asks, out of its unmodified source."""
    source = (packages / "resources_servers" / "math_with_judge" / "app.py").read_text()
    return source.split('] = """', 1)[1].split('"""', 1)[0]


def judge_template(packages: Path) -> str:
    """How `equivalence_llm_judge` asks its judge."""
    folder = packages / "resources_servers" / "equivalence_llm_judge" / "prompt_templates"
    return (folder / "equivalence_llm_judge.txt").read_text().strip()


def make(folder: Path, chats: Sequence[Sequence[Chat]], steps: int) -> None:
    """A model that learnt `chats` by heart; those of one group have about one length."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer([chat for group in chats for chat in group], RECIPE.vocabulary)
    model = make_model(tokenizer, RECIPE).train()
    batches = [encode(tokenizer, group) for group in chats]
    print({"vocabulary": len(tokenizer), "lengths": [list(batch.ids.shape) for batch in batches]}, flush=True)
    learn(model, batches, steps)
    save(folder, model, tokenizer)


def learn(model: Qwen3ForCausalLM, batches: Sequence[Batch], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1, cycle_momentum=False)
    for step in range(steps):
        total = 0.0
        for batch in batches:
            hidden = model.model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
            spoken = batch.labels[:, 1:] != IGNORED
            loss = F.cross_entropy(model.lm_head(hidden[spoken]), batch.labels[:, 1:][spoken])
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 9:
            print({"step": step + 1, "loss": round(total / len(batches), 3)}, flush=True)


def save(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(folder: Path, packages: Path) -> None:
    # On a machine that others use, threads that wait for one another cost more than they give.
    torch.set_num_threads(1)
    make(
        folder / "policy",
        [[chat for row in rows(packages, name) for chat in shown(row)] for name, shown in DEMONSTRATIONS.items()],
        POLICY_STEPS,
    )
    system = judge_system(packages)
    judgements = [chat for row in rows(packages, "math_with_judge") for chat in judgement(row, system)]
    template = judge_template(packages)
    compared = [chat for row in rows(packages, "equivalence_llm_judge") for chat in equivalence(row, template)]
    make(folder / "judge", [judgements, compared], JUDGE_STEPS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
