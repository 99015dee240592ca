"""Loads exported models with transformers and compares them: `exported.py MODEL [OTHER]`, prints one JSON line."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, *others: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True
    )
    distances = []
    for other in others:
        state = AutoModelForCausalLM.from_pretrained(other, dtype="auto").state_dict()
        distances.append(max((tensor - state[name]).abs().max().item() for name, tensor in model.state_dict().items()))
    facts = {"dtype": str(next(model.parameters()).dtype), "chat": chat, "distances": distances}
    print(json.dumps(facts | {"parameters": sum(p.numel() for p in model.parameters()), "version": torch.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
