from __future__ import annotations

from hpc_gym.node.precheck import gpu_problems


def test_a_gpu_in_use_or_with_uncorrected_errors_is_named() -> None:
    answer = "0, 3, 81559, 0\n1, 60211, 81559, 0\n2, 3, 81559, 4\n"
    assert list(gpu_problems(answer)) == [
        "GPU 1 has 60211 of 81559 MiB in use by somebody else",
        "GPU 2 has 4 uncorrected ECC errors",
    ]


def test_a_gpu_without_ecc_is_no_problem() -> None:
    assert list(gpu_problems("0, 3, 24564, [N/A]\n")) == []


def test_words_in_the_place_of_a_row_are_a_problem() -> None:
    assert list(gpu_problems("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.\n")) == [
        "nvidia-smi: Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost."
    ]
