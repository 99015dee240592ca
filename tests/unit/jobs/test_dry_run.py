"""`--dry-run` prints the very bytes that a submit hands to the shell or to sbatch, for every shipped experiment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_project import make_model, write_rows

from hpc_gym.jobs import local
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.request import prepare
from hpc_gym.jobs.submission import submit_request
from hpc_gym.shipped import shipped

EXPERIMENTS = sorted(file.stem for file in (shipped("configs") / "experiments").glob("*.yaml"))
SBATCH = f"""#!{sys.executable}
import pathlib, sys
script = pathlib.Path(sys.argv[-1])
pathlib.Path(__file__).with_name("received").write_bytes(script.read_bytes())
print("4711")
"""
"""Stands for Slurm's, which takes the script as it is; tests/slurm hands the same scripts to a real one."""


@pytest.mark.parametrize(("name", "cluster"), [("demo", "local"), *((each, "slurm-example") for each in EXPERIMENTS)])
def test_dry_run_prints_what_is_submitted(
    name: str, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    make_model(tmp_path / "model")
    tree = yaml.safe_load((shipped("configs") / f"experiments/{name}.yaml").read_text())
    for source in (*tree["data"]["train"], *tree["data"]["eval"]):
        write_rows(source["path"].replace("${vars.data_dir}", "data").replace("${vars.demo_dir}", "data"))
    folder = "demo_dir" if name == "demo" else "data_dir"
    overrides = [f"vars.{folder}=data", "model.path=model"]
    command = [sys.executable, "-m", "hpc_gym.cli.main", "submit", name, *overrides, "--cluster", cluster, "--dry-run"]
    printed = subprocess.run(command, capture_output=True, check=False)
    assert printed.stderr == b""
    assert [path.name for path in tmp_path.iterdir() if "runs" in path.name] == []

    record = submit_request(prepare(name, overrides, cluster), Path.touch)
    try:
        assert (Path(record.run_dir) / "job.sh").read_bytes() == printed.stdout
        assert JobRecord.read(record.run_dir) == record
        if cluster != "local":
            assert (programs / "received").read_bytes() == printed.stdout
            assert record.job_id == "4711"
    finally:
        local.kill(record)
