"""Options pass through under their programs' own names, checked against what the locked programs accept."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_gym.plan.options import option_problems
from hpc_gym.plan.owned import DEEPSPEED, GRPO, VLLM
from hpc_gym.plan.processes import vllm_flags
from hpc_gym.runtimes.options import table


def told(**sections: dict[str, Any]) -> list[str]:
    """What is said against these sections."""
    tree = {"deepspeed": {"zero_stage": 2}, **sections}
    return [f"{'.'.join(map(str, problem.path))}: {problem.message}" for problem in option_problems(tree)]


@pytest.mark.parametrize(
    "sections",
    [
        {"vllm": {"max_model_len": 4096, "gpu_memory_utilization": 0.9, "enforce_eager": True}},
        {"vllm": {"max_model_len": "16k", "tool_call_parser": None}},
        {"vllm": {"compilation_config": {"level": 3}, "cudagraph_capture_sizes": [1, 2]}},
        {"grpo": {"learning_rate": 1, "lr_scheduler_type": "cosine", "epsilon_high": None, "scale_rewards": "group"}},
        {"grpo": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "loss_type": "dapo"}},
        {"deepspeed": {"zero_stage": 3, "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": "auto"}}},
        {"deepspeed": {"zero_stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
    ],
)
def test_what_the_programs_accept_passes(sections: dict[str, dict[str, Any]]) -> None:
    assert told(**sections) == []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"vllm": {"max_modell_len": 1}},
            "vllm.max_modell_len: `vllm serve` has no such option; did you mean 'max_model_len'?",
        ),
        (
            {"vllm": {"max-model-len": 1}},
            "vllm.max-model-len: `vllm serve` has no such option; did you mean 'max_model_len'?",
        ),
        (
            {"grpo": {"learning_rte": 1}},
            "grpo.learning_rte: TRL's GRPOConfig has no such option; did you mean 'learning_rate'?",
        ),
        (
            {"deepspeed": {"zero_stage": 2, "zero_optimisation": {}}},
            "deepspeed.zero_optimisation: DeepSpeed has no such option; did you mean 'zero_optimization'?",
        ),
        (
            {"deepspeed": {"zero_stage": 2, "zero_optimization": {"overlap_com": True}}},
            "deepspeed.zero_optimization.overlap_com: DeepSpeed has no such option; did you mean 'overlap_comm'?",
        ),
        ({"grpo": {"learning_rate": "fast"}}, "grpo.learning_rate: must be a number, not the text 'fast'."),
        ({"grpo": {"beta": None}}, "grpo.beta: must be a number, not null."),
        ({"grpo": {"num_generations": 2.5}}, "grpo.num_generations: must be a whole number or null, not 2.5."),
        ({"vllm": {"enforce_eager": "yes"}}, "vllm.enforce_eager: must be true or false, not the text 'yes'."),
        ({"vllm": {"max_num_seqs": True}}, "vllm.max_num_seqs: must be a whole number or null, not true."),
        (
            {"grpo": {"model_init_kwargs": {"dtype": "float16"}}},
            "grpo.model_init_kwargs.dtype: hpc-gym owns this option: set model.dtype: vLLM and the trainer must use "
            "the same.",
        ),
    ],
)
def test_what_they_do_not_accept_is_refused(sections: dict[str, dict[str, Any]], says: str) -> None:
    assert told(**sections) == [says]


def test_a_choice_is_refused_with_all_that_are_allowed() -> None:
    (message,) = told(grpo={"lr_scheduler_type": "cosin"})
    assert message.startswith("grpo.lr_scheduler_type: 'cosin' is not allowed; allowed: 'linear', 'cosine', ")


def test_no_reason_is_kept_for_an_option_that_the_programs_lost() -> None:
    kept_for_people = {"max_prompt_length"}  # TRL had it; its users look for it
    for section, owned in (("vllm", VLLM), ("grpo", GRPO), ("deepspeed", DEEPSPEED)):
        assert set(owned) - set(table(section)) <= kept_for_people  # type: ignore[arg-type]


def test_options_become_flags() -> None:
    options = {
        "max_model_len": 5,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "compilation_config": {"b": 1, "a": 2},
        "cudagraph_capture_sizes": [1, 2],
        "tool_call_parser": None,
    }
    assert vllm_flags(options) == [
        *("--compilation-config", '{"a": 2, "b": 1}'),
        *("--cudagraph-capture-sizes", "1", "2"),
        "--no-enable-prefix-caching",
        "--enforce-eager",
        *("--max-model-len", "5"),
    ]


def test_a_flag_that_cannot_be_negated_is_left_out() -> None:
    name = next(name for name, option in table("vllm").items() if option.type == "bool" and not option.negatable)
    assert vllm_flags({name: False}) == []
    assert vllm_flags({name: True}) == [f"--{name.replace('_', '-')}"]
