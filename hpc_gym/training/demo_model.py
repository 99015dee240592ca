"""The demo's model: a small Qwen3, its tokenizer and chat template, made on the spot and warm-started by SFT.

    python -m hpc_gym.training.demo_model --out DIR --seed S --threads N

Reinforcement learning can only sharpen what a policy sometimes does, so the model first learns from demonstrations.
Half of them carry one deliberate bad habit per environment: chain_sum is answered by a sentence, where the verifier
gives full marks to the bare number only, and the second addition of the counter is skipped. GRPO mostly unlearns these.

The tokenizer is trained on what the chat template renders, so that the preamble for tools, hundreds of bytes long, is
a few tokens. Progress goes to stdout as JSON lines: `{"stage": "tokenizer|train|saved", "step", "steps", "seconds"}`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hpc_gym.data import demo_rows
from hpc_gym.data.demo_rows import CHAIN_SUM, COUNTER, Row

Message = dict[str, Any]

PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
HEADER = "assistant\n"
"""What follows TURN_START in the policy's turns. One token, so that a prompt ends on a token's boundary."""
HEADER_TOKEN = HEADER.replace("\n", "Ċ")
"""HEADER as the byte-level alphabet writes it."""
IGNORED = -100
"""Label of tokens that the policy does not say (PyTorch's `cross_entropy` default)."""


@dataclass(frozen=True)
class Recipe:
    """How the model is made."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    context: int = 1024
    vocabulary: int = 1024
    """At most; merges run out earlier."""
    tokenizer_chats: int = 300
    """Demonstrations per environment that the tokenizer is trained on."""
    steps: int = 320
    chain_sum_per_step: int = 96
    counter_per_step: int = 10
    careless: float = 0.5
    """Share of demonstrations that carry the bad habit."""
    matrix_learning_rate: float = 1e-2
    """Of Muon, for the matrices inside the layers: half of AdamW's steps for the same accuracy."""
    other_learning_rate: float = 3e-3
    """Of AdamW, for the embedding and the norms."""
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps in which the learning rates rise."""
    gradient_norm: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Demonstrations as tokens. Both [demonstrations, tokens]; labels are IGNORED where the policy does not speak."""

    ids: torch.Tensor
    labels: torch.Tensor


def demonstration(row: Row, careless: bool, start: int = 0) -> list[Message]:
    """The chat of a policy that answers `row`, with the bad habit or without; `start` is where the counter starts."""
    question = demo_rows.question(row)
    if "answer" in row:
        answer = f"The answer is {row['answer']}." if careless else row["answer"]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    summands = [int(number) for number in re.findall(r"\d+", question)]
    done = summands[:1] if careless else summands
    messages: list[Message] = [{"role": "user", "content": question}]
    for summand in done:
        messages += [_call("increment_counter", {"count": summand}), {"role": "tool", "content": '{"success":true}'}]
    count = start + sum(done)
    return [
        *messages,
        _call("get_counter_value", {}),
        {"role": "tool", "content": f'{{"count":{count}}}'},
        {"role": "assistant", "content": f"The count is {count}."},
    ]


def tools(row: Row) -> list[dict[str, Any]] | None:
    """The row's tools as a chat template sees them.

    NeMo Gym (`responses_converter.py`, 0.4.0) drops `strict` from them, and vLLM orders their keys by its own models.
    """
    offered = row["responses_create_params"].get("tools")
    if not offered:
        return None
    keys = ("name", "description", "parameters")
    return [{"type": "function", "function": {key: tool[key] for key in keys}} for tool in offered]


def make_tokenizer(chats: Sequence[tuple[Row, list[Message]]], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, trained on how the chat template renders `chats`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(HEADER), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    template = (Path(__file__).parent / "demo_chat_template.jinja").read_text().rstrip("\n")
    marks = (PADDING, TURN_START, TURN_END, CALL_START, CALL_END)
    between_marks = re.compile("|".join(map(re.escape, marks)))
    renderer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template)
    corpus = [
        piece
        for row, messages in chats
        for piece in between_marks.split(renderer.apply_chat_template(messages, tools=tools(row), tokenize=False))
        if piece
    ]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            # The marks of a call are no special tokens, as in Qwen3: a server that skips special tokens must show them.
            special_tokens=[AddedToken(mark, special=mark not in (CALL_START, CALL_END)) for mark in marks],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=400,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PADDING,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen3ForCausalLM:
    """A random float32 Qwen3 with tied embeddings whose vocabulary is exactly the tokenizer's."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            # Sampled ids beyond the tokenizer's would decode to nothing.
            vocab_size=len(tokenizer),
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, chats: Sequence[tuple[Row, list[Message]]]) -> Batch:
    """The chats as the template renders them, padded on the right; labels are the policy's turns, TURN_END included."""
    texts = [tokenizer.apply_chat_template(messages, tools=tools(row), tokenize=False) for row, messages in chats]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    pad, end, header = (tokenizer.convert_tokens_to_ids(token) for token in (PADDING, TURN_END, HEADER_TOKEN))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, IGNORED)
    speaking = torch.zeros(len(rows), dtype=torch.bool)
    for position in range(width):
        column = ids[:, position]
        labels[speaking, position] = column[speaking]
        speaking = (speaking & (column != end)) | (column == header)
    return Batch(ids, labels)


class WarmStart:
    """SFT on demonstrations drawn from the rows that are not held out."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> None:
        self.model, self.recipe = model, recipe
        self._generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        chain_sum = demo_rows.split(CHAIN_SUM, seed).train
        # Chats of one environment in one batch, and careless ones apart: equal lengths, little padding.
        self._chain_sum = [
            encode(tokenizer, [(row, demonstration(row, careless)) for row in chain_sum]) for careless in (False, True)
        ]
        counter = draw(COUNTER, recipe.steps * recipe.counter_per_step, recipe.careless, seed, rng)
        self._counter = encode(tokenizer, counter)
        self.optimizers, self.schedules = _optimizers(model, recipe)

    def step(self, step: int) -> float:
        """One update; the sum of the environments' mean losses, nats per token."""
        recipe = self.recipe
        drawn = torch.randint(len(self._chain_sum[0].ids), (recipe.chain_sum_per_step,), generator=self._generator)
        careless = round(recipe.careless * recipe.chain_sum_per_step)
        counter = slice(step * recipe.counter_per_step, (step + 1) * recipe.counter_per_step)
        chain_sum_batches = [
            (batch.ids[rows], batch.labels[rows])
            for batch, rows in zip(self._chain_sum, (drawn[careless:], drawn[:careless]), strict=True)
        ]
        total = 0.0
        for batches in (chain_sum_batches, [(self._counter.ids[counter], self._counter.labels[counter])]):
            losses, tokens = zip(*(self._loss(ids, labels) for ids, labels in batches), strict=True)
            loss = torch.stack(losses).sum() / sum(tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_norm)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return total

    def _loss(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Summed loss and number of the tokens that the policy says."""
        # No attention mask: causal attention never looks at padding on the right. Logits only where they count.
        hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        spoken = labels[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[spoken])
        return F.cross_entropy(logits, labels[:, 1:][spoken], reduction="sum"), int(spoken.sum())


def draw(
    environment: str, count: int, careless: float, seed: int, rng: random.Random
) -> list[tuple[Row, list[Message]]]:
    """`count` demonstrations of that environment's training rows; the counter starts anew in each."""
    rows = demo_rows.split(environment, seed).train
    drawn = (rng.choice(rows) for _ in range(count))
    return [
        (row, demonstration(row, rng.random() < careless, rng.randint(0, demo_rows.LARGEST_START))) for row in drawn
    ]


def make(out: Path, seed: int, recipe: Recipe) -> None:
    """Makes the model and writes it to `out` as a Hugging Face folder, whole or not at all."""
    started = time.monotonic()
    random.seed(seed)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    chats = [
        chat
        for environment in demo_rows.ENVIRONMENTS
        for chat in draw(environment, recipe.tokenizer_chats, recipe.careless, seed, rng)
    ]
    tokenizer = make_tokenizer(chats, recipe.vocabulary)
    model = make_model(tokenizer, recipe)
    _say("tokenizer", 0, recipe, started, vocabulary=len(tokenizer), parameters=model.num_parameters())
    warm_start = WarmStart(model.train(), tokenizer, recipe, seed)
    for step in range(recipe.steps):
        loss = warm_start.step(step)
        _say("train", step + 1, recipe, started, loss=round(loss, 4))
    _save(out, model.eval(), tokenizer)
    _say("saved", recipe.steps, recipe, started, path=str(out))


def _optimizers(
    model: Qwen3ForCausalLM, recipe: Recipe
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.OneCycleLR]]:
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    decay = recipe.weight_decay
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (
            torch.optim.Muon(
                matrices, lr=recipe.matrix_learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            recipe.matrix_learning_rate,
        ),
        (
            torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.98), weight_decay=decay, fused=True),
            recipe.other_learning_rate,
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
        )
        for optimizer, rate in optimizers
    ]
    return [optimizer for optimizer, _ in optimizers], schedules


def _save(out: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    partial = out.with_name(f"{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(out)
    except OSError:
        # Somebody else made the same model in the meantime: theirs is as good.
        if not (out / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say(stage: str, step: int, recipe: Recipe, started: float, **facts: Any) -> None:
    seconds = round(time.monotonic() - started, 2)
    print(json.dumps({"stage": stage, "step": step, "steps": recipe.steps, "seconds": seconds, **facts}), flush=True)


def _call(name: str, arguments: dict[str, int]) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def main() -> None:
    """Command line, see the module."""
    parser = argparse.ArgumentParser(prog="python -m hpc_gym.training.demo_model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out rows, the weights and the demonstrations")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make(arguments.out, arguments.seed, Recipe())


if __name__ == "__main__":
    main()
