"""The option tables, as the checks of an experiment read them."""

from __future__ import annotations

import enum
import subprocess
import sys
from typing import Any, Literal

import pytest

from hpc_gym.runtimes.extract.hints import choices, joined, plain, words
from hpc_gym.runtimes.extract.vllm_table import _type_words
from hpc_gym.runtimes.options import gym_configs, source, table


def test_vllm_options_have_their_yaml_names_types_and_flags() -> None:
    options = table("vllm")
    assert options["max_model_len"].flag == "--max-model-len"
    assert options["max_model_len"].type == "int|str|null"
    assert options["tensor_parallel_size"].type == "int"
    assert options["tensor_parallel_size"].help
    assert options["gpu_memory_utilization"].type == "float"
    assert options["enable_prefix_caching"].type == "bool"
    assert options["enable_prefix_caching"].negatable
    assert not options["disable_log_stats"].negatable
    assert "dict" in options["hf_overrides"].type.split("|")
    assert "auto" in (options["kv_cache_dtype"].choices or ())


def test_grpo_has_its_own_fields_and_those_of_training_arguments() -> None:
    options = table("grpo")
    assert (options["num_generations"].type, options["num_generations"].default) == ("int|null", 8)
    assert options["learning_rate"].type == "float"
    assert options["save_strategy"].choices == ("no", "steps", "epoch", "best")
    assert "constant_with_warmup" in (options["lr_scheduler_type"].choices or ())


def test_deepspeed_has_top_level_keys_and_the_fields_of_its_sections() -> None:
    options = table("deepspeed")
    assert options["zero_allow_untested_optimizer"].type == "bool"
    assert "str" in options["gradient_clipping"].type.split("|"), '"auto" is transformers\' to fill in'
    zero = options["zero_optimization"].fields
    assert zero["overlap_comm"].type == "bool|null"
    assert "stage3_prefetch_bucket_size" in zero
    assert zero["offload_optimizer"].fields["device"].choices == ("none", "cpu", "nvme")


def test_gym_configurations_name_their_agent_and_the_models_they_need() -> None:
    configs = gym_configs()
    judged = configs["resources_servers/math_with_judge/configs/math_with_judge.yaml"]
    assert judged.instances["math_with_judge_simple_agent"] == "responses_api_agents"
    assert "policy_model" in judged.models
    assert judged.data == ("resources_servers/math_with_judge/data/example.jsonl",)
    unmet = configs["resources_servers/instruction_following/configs/instruction_following.yaml"].missing
    assert any("git+https" in requirement for requirement in unmet)


def test_tables_say_which_versions_they_are_from() -> None:
    assert source("vllm") == {"vllm": "0.32.0"}
    assert source("grpo")["trl"] == "1.16.0"
    assert source("gym") == {"nemo-gym": "0.4.0"}


def test_reading_the_tables_imports_none_of_the_programs() -> None:
    program = (
        "import sys; from hpc_gym.runtimes.options import table, gym_configs; table('vllm'); gym_configs();"
        "print({'torch', 'vllm', 'trl', 'yaml', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (int, "int"),
        (bool | None, "bool|null"),
        (list[str] | str, "str|list"),
        (dict[str, Any], "dict"),
        (Literal["a", 1], "int|str"),
        (Colour, "str"),
        (Any, ""),
        (int | Any, ""),
    ],
)
def test_type_hints_become_words(hint: Any, expected: str) -> None:
    assert joined(words(hint)) == expected


def test_choices_are_closed_only_where_the_program_takes_nothing_else() -> None:
    assert choices(Literal["a", "b"] | None) == ["a", "b"]
    assert choices(Colour | str) == ["red", "blue"]
    assert choices(Literal["a"] | int) is None
    assert choices(str) is None


def test_vllm_parsers_of_text_are_seen_through() -> None:
    def optional_type(return_type: Any) -> Any:
        def _optional_type(value: str) -> Any:
            return None if value == "None" else return_type(value)

        return _optional_type

    assert _type_words(optional_type(float)) == {"float", "null"}


def test_defaults_have_no_address_in_them() -> None:
    assert plain({"a": (1, Colour.RED), "b": object()}) == {"a": [1, "red"], "b": "<object>"}
