"""An interpreter is one that runs and is of the wanted version, whatever it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tiny_runtime import PYTHON

from hpc_gym.errors import UserError
from hpc_gym.runtimes.interpreter import find_python


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def pretending(version: str) -> str:
    return f'printf "{version}\\ncpython\\n$0\\n"'


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No interpreter but the running one."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.delenv("HPC_GYM_PYTHON", raising=False)
    return tmp_path


def test_the_running_interpreter_is_taken_without_its_venv(nowhere: Path) -> None:
    assert find_python([PYTHON], "this") == Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]


def test_a_version_that_only_pyenv_has_is_found_behind_its_broken_shim(nowhere: Path) -> None:
    program(nowhere / "bin" / "python3.99", "echo 'pyenv: python3.99: command not found' >&2; exit 127")
    real = program(nowhere / "pyenv" / "versions" / "3.99.1" / "bin" / "python3.99", pretending("3.99"))
    assert find_python(["3.99"], "this") == real


def test_versions_are_tried_best_first(nowhere: Path) -> None:
    program(nowhere / "bin" / "python3.98", pretending("3.98"))
    better = program(nowhere / "uv" / "cpython-3.99.0-linux" / "bin" / "python3.99", pretending("3.99"))
    assert find_python(["3.99", "3.98"], "this") == better


def test_a_python3_of_another_version_is_not_taken(nowhere: Path) -> None:
    program(nowhere / "bin" / "python3", pretending("3.98"))
    with pytest.raises(UserError, match=r"this needs Python 3\.99"):
        find_python(["3.99"], "this")
    assert find_python(["3.99", "3.98"], "this") == nowhere / "bin" / "python3"


def test_the_person_can_name_one(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = program(nowhere / "opt" / "my-python", pretending("3.99"))
    monkeypatch.setenv("HPC_GYM_PYTHON", f"/does/not/exist:{own}")
    assert find_python(["3.99"], "this") == own


def test_an_interpreter_that_is_not_cpython_is_not_taken(nowhere: Path) -> None:
    program(nowhere / "bin" / "python3.99", 'printf "3.99\\npypy\\n$0\\n"')
    with pytest.raises(UserError):
        find_python(["3.99"], "this")
