"""Chat templates that render and tokenize in different ways, with a real byte-level BPE tokenizer behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hpc_gym.rollout.vllm import Rendered

SPECIAL = ("<|end|>", "<|start|>", "<|pad|>", "<|call|>")
_TEXTS = [
    "user assistant system tool tool_call name arguments think",
    "the answer is 42. one two three ten\n\n",
    '{"a": "b"}',
]


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_TEXTS * 20, trainer)
    return made


def decode(ids: list[int]) -> str:
    text: str = tokenizer().decode(ids, skip_special_tokens=False)
    return text


@dataclass(frozen=True)
class Template:
    """`words` and `call` render an assistant's text and its tool calls; `end` and `call_end` close such a turn."""

    name: str
    words: str
    end: str
    call_end: str
    call: str = (
        """<tool_call>{"name": "' + c.function.name + '", """
        """"arguments": ' + (c.function.arguments | tojson) + '}</tool_call>"""
    )
    stop: str = "<|end|>"
    call_stop: str = "<|end|>"

    @property
    def call_syntax(self) -> str:
        """What of a tool call follows the contents of its last argument."""
        return '"}}</tool_call>'

    @property
    def source(self) -> str:
        return (
            "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|start|>assistant\n' }}"
            "{%- if m.content %}" + self.words + "{%- endif %}"
            "{%- for c in m.tool_calls or [] %}{{- '" + self.call + "' }}{%- endfor %}"
            "{%- if m.tool_calls %}{{- '" + self.call_end + "' }}{%- else %}{{- '" + self.end + "' }}{%- endif %}"
            "{%- else %}{{- '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}"
        )

    def text(self, messages: Any, add_generation_prompt: bool = True) -> str:
        """The conversation as vLLM's renderer would write it: arguments are objects in templates."""
        plain = json.loads(json.dumps(messages))
        for message in plain:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return _compiled(self.source).render(messages=plain, add_generation_prompt=add_generation_prompt)


@cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


TEMPLATES = (
    Template("plain", "{{- m.content }}", "<|end|>\\n", "<|end|>\\n"),
    Template("strips", "{{- m.content | trim }}", "<|end|>\\n", "<|end|>\\n"),
    Template("adds a newline", "{{- m.content }}", "\\n<|end|>\\n", "\\n<|end|>\\n"),
    Template("drops thoughts", "{{- m.content.split('</think>')[-1] }}", "<|end|>\\n", "<|end|>\\n"),
    Template("thinks for it", "{{- '<think>\\n\\n</think>' + m.content }}", "<|end|>", "<|end|>"),
    Template("closes calls otherwise", "{{- m.content }}", "<|end|>\\n", "<|call|>\\n", call_stop="<|call|>"),
    Template("never closes", "{{- m.content }}", "\\n\\n", "\\n\\n"),
)


class LocalVllm:
    """Renders as vLLM's `/v1/chat/completions/render` does: the chat template, then the tokenizer."""

    name = "local"

    def __init__(self, template: Template) -> None:
        self.template = template
        self.calls = 0

    async def render(self, chat: bytes, _: float) -> Rendered:
        self.calls += 1
        body: Mapping[str, Any] = json.loads(chat)
        text = self.template.text(body["messages"], body.get("add_generation_prompt", True))
        return Rendered(tokenizer().encode(text, add_special_tokens=False).ids, {})
