"""The commands that run a program in its runtime."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hpc_gym.plan.plan import Runtime
from hpc_gym.runtimes.prefix import command

ARGV = ("vllm", "serve", "/models/a b")
ENV = {"PATH": "/usr/bin", "WANDB_API_KEY": "secret"}


def test_a_venv_is_entered_by_the_environment_alone() -> None:
    runtime = Runtime(name="gym", kind="venv", root="/cache/gym-1", python="/cache/gym-1/bin/python")
    argv, env = command(runtime, ARGV, ENV)
    assert argv == ARGV
    assert env == {**ENV, "VIRTUAL_ENV": "/cache/gym-1", "PATH": "/cache/gym-1/bin:/usr/bin"}


def test_apptainer_mounts_what_the_job_needs_and_gets_values_by_the_environment() -> None:
    runtime = Runtime("gym", "apptainer", "/images/gym.sif", "python", options=("--nv",))
    argv, env = command(runtime, ARGV, ENV, mounts=("/runs/demo", "/scratch/x"))
    assert argv == (
        *("apptainer", "exec", "--nv", "--bind", "/runs/demo", "--bind", "/scratch/x", "/images/gym.sif"),
        *ARGV,
    )
    assert env == ENV


def test_pyxis_is_a_step_on_the_node_of_its_supervisor() -> None:
    runtime = Runtime("gym", "pyxis", "/images/gym.sqsh", "python", options=("--no-container-mount-home",))
    argv, env = command(runtime, ARGV, ENV, mounts=("/runs/demo", "/scratch/x"), node="n17")
    assert argv == (
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--export=ALL", "--nodelist=n17"),
        "--container-image=/images/gym.sqsh",
        "--container-mounts=/runs/demo:/runs/demo,/scratch/x:/scratch/x",
        "--no-container-mount-home",
        *ARGV,
    )
    assert env == ENV


def test_no_value_of_the_environment_is_on_a_command_line() -> None:
    for kind in ("venv", "modules", "apptainer", "pyxis"):
        runtime = Runtime("gym", kind, "/root", "python")  # type: ignore[arg-type]
        assert "secret" not in " ".join(command(runtime, ARGV, ENV)[0])


def test_modules_are_loaded_before_the_venv_is_entered(tmp_path: Path) -> None:
    """Run by a real shell, with a `module` function like a site's that puts itself first on PATH."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text('module() { echo "module $*"; export PATH="/from/module:$PATH"; }\n')
    program = tmp_path / "venv dir" / "bin" / "show"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/bash\necho "$PATH"; echo "$VIRTUAL_ENV"; printf "<%s>" "$@"\n')
    program.chmod(0o755)
    root = str(program.parents[1])
    runtime = Runtime("train", "modules", root, f"{root}/bin/python", modules=("cuda/13.0", "gcc (new)"))
    argv, env = command(runtime, ("show", "a b", "$HOME"), {"PATH": os.environ["PATH"], "MODULESHOME": str(tmp_path)})
    output = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[0] == "module load cuda/13.0 gcc (new)"
    assert output[1].startswith(f"{root}/bin:/from/module:")
    assert output[2:] == [root, "<a b><$HOME>"]


def test_a_module_that_does_not_load_stops_the_program(tmp_path: Path) -> None:
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text("module() { echo 'no such module' >&2; return 1; }\n")
    runtime = Runtime("train", "modules", "", "python", modules=("cuda/99",))
    argv, env = command(runtime, ("echo", "ran"), {"PATH": os.environ["PATH"], "MODULESHOME": str(tmp_path)})
    run = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
