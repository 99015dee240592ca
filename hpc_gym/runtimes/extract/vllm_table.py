"""Every option of `vllm serve`, from its own argument parser."""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import sys
from typing import Any

from hpc_gym.runtimes.extract.hints import first_paragraph, joined, plain


def table() -> dict[str, Any]:
    """Options by the name that YAML has for them: the first long flag, with underscores."""
    # vLLM fills in the help texts only where it sees that help is asked for, and looks at the command line on import.
    sys.argv.append("--help")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = {}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if not flags or isinstance(action, argparse._HelpAction):
            continue
        options[flags[0][2:].replace("-", "_")] = {
            "type": joined(_words(action)),
            "choices": sorted(filter(None, action.choices), key=str) if action.choices is not None else None,
            "default": None if action.default == argparse.SUPPRESS else plain(action.default),
            "help": first_paragraph(action.help if action.help != argparse.SUPPRESS else ""),
            "flag": flags[0],
            "negatable": isinstance(action, argparse.BooleanOptionalAction),
        }
    version = importlib.metadata.version("vllm").partition("+")[0]
    return {"source": {"vllm": version}, "options": options}


def _words(action: argparse.Action) -> set[str]:
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction | argparse._StoreFalseAction):
        return {"bool"}
    found = _type_words(action.type)
    if action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction):
        return found | {"list"}
    if isinstance(action.default, list):
        return {"list", "str"}
    return found | ({"null"} if action.default is None else set())


def _type_words(kind: Any) -> set[str]:
    """The words for argparse's `type`: a class, or one of vLLM's functions that parse a text."""
    if kind in (int, float, str):
        return {kind.__name__}
    if kind is None:
        return {"str"}
    if kind is json.loads:
        return {"dict", "list", "str"}
    name = getattr(kind, "__qualname__", "")
    if "optional_type" in name or "parse_type" in name:
        # Both close over the function that does the work, once "None" is dealt with.
        inner = inspect.getclosurevars(kind).nonlocals["return_type"]
        return _type_words(inner) | ({"null"} if "optional_type" in name else set())
    if "human_readable_int" in name:
        return {"int", "str"}
    if "parse_dataclass" in name or "union_dict_and_str" in name:
        return {"dict", "str"}
    return {"str", "int", "list", "dict"} if "lambda" in name else {"dict", "str"}
