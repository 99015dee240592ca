from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_gym.node import engines
from hpc_gym.node.engines import Place, entered
from hpc_gym.plan.plan import Runtime

PLACE = Place("node7", 1, True, "/shared/runs/a", ("/tmp/hg-1", "/data"))
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "WANDB_API_KEY": "planted",
    "PYTHONPATH": "/shared/runs/a/code",
    "HOME": "/home/u",
}
ARGV = ("vllm", "serve", "a model")

# `apptainer exec --help` of Apptainer 1.4, https://apptainer.org/docs/user/1.4/cli/apptainer_exec.html
APPTAINER_EXEC = {"--nv", "--bind", "--pwd", "--cleanenv", "--rocm", "--no-home", "--writable-tmpfs"}
# srun(1) of Slurm 24.11, and the options that pyxis 0.20 adds: https://github.com/NVIDIA/pyxis, README "Usage"
SRUN = {"--overlap", "--nodes", "--ntasks", "--nodelist", "--het-group", "--export", "--cpu-bind", "--mpi"}
SRUN |= {"--kill-on-bad-exit", "--unbuffered"}
PYXIS = {
    "--container-image",
    "--container-mounts",
    "--container-workdir",
    "--container-env",
    "--no-container-mount-home",
}


def runtime(kind: str, **fields: object) -> Runtime:
    return replace(Runtime("inference-cuda", "venv", "/images/inference.sif", "python"), kind=kind, **fields)


def options_before(argv: tuple[str, ...], end: str) -> set[str]:
    """Names of the options that stand before the argument `end`."""
    return {part.partition("=")[0] for part in argv[: argv.index(end)] if part.startswith("--")}


def test_apptainer_gets_documented_options_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "_NVIDIA", tmp_path)
    argv, environment = entered(runtime("apptainer", options=("--writable-tmpfs",)), ARGV, ENVIRONMENT, PLACE)
    assert argv[:2] == ("apptainer", "exec")
    assert options_before(argv, "/images/inference.sif") == {"--nv", "--bind", "--pwd", "--writable-tmpfs"}
    assert options_before(argv, "/images/inference.sif") <= APPTAINER_EXEC
    assert argv[-4:] == ("/images/inference.sif", *ARGV)
    assert [argv[index + 1] for index, part in enumerate(argv) if part == "--bind"] == [
        "/shared/runs/a",
        "/tmp/hg-1",
        "/data",
    ]
    assert not any("planted" in part for part in argv)
    assert environment == ENVIRONMENT


def test_without_a_gpu_apptainer_is_not_asked_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "_NVIDIA", tmp_path / "none")
    assert "--nv" not in entered(runtime("apptainer"), ARGV, ENVIRONMENT, PLACE)[0]


def test_pyxis_is_a_step_of_its_own_on_this_node_and_keeps_our_variables() -> None:
    argv, _ = entered(runtime("pyxis", root="/images/a.sqsh"), ARGV, ENVIRONMENT, PLACE)
    assert argv[0] == "srun"
    assert argv[-3:] == ARGV
    assert options_before(argv, "vllm") <= SRUN | PYXIS
    assert {"--overlap", "--nodelist=node7", "--het-group=1", "--container-image=/images/a.sqsh"} <= set(argv)
    assert "--container-env=PYTHONPATH,WANDB_API_KEY" in argv
    assert "--container-mounts=/shared/runs/a:/shared/runs/a,/tmp/hg-1:/tmp/hg-1,/data:/data" in argv
    assert not any("planted" in part for part in argv)
    plain, _ = entered(runtime("pyxis"), ARGV, ENVIRONMENT, replace(PLACE, heterogeneous=False))
    assert not any(part.startswith("--het-group") for part in plain)


def test_modules_are_loaded_and_the_program_keeps_the_process_id_and_its_arguments(tmp_path: Path) -> None:
    venv = tmp_path / "a venv"
    (venv / "bin").mkdir(parents=True)
    program = venv / "bin" / "program"
    program.write_text('#!/bin/bash\necho "$$" "$LOADED" "$1" "${PATH%%:*}"\n')
    program.chmod(0o755)
    profile = tmp_path / ".bash_profile"
    profile.write_text('module() { shift; LOADED="$*"; export LOADED; PATH=/usr/bin:/bin; }\n')
    argv, environment = entered(
        runtime("modules", root=str(venv), modules=("cuda/12.8", "gcc 13")),
        ("program", "two words; $HOME"),
        {**ENVIRONMENT, "HOME": str(tmp_path)},
        PLACE,
    )
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=20)
    assert said == f"{process.pid} cuda/12.8 gcc 13 two words; $HOME {venv}/bin\n"
