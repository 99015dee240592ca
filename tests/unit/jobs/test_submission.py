"""Submitting, as far as it goes without a job: the executor, the API's refusals, snapshots, run directories."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
from job_plans import plan, task
from small_project import Project

import hpc_gym
from hpc_gym.errors import UserError
from hpc_gym.jobs import executor as executor_module
from hpc_gym.jobs import local, submission
from hpc_gym.jobs.executor import HpcgymExecutor
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.snapshot import snapshot
from hpc_gym.jobs.submission import submit_request
from hpc_gym.plan.plan import Judge, Launch, Plan
from hpc_gym.runtimes.spec import MARKER, default_names, spec_of


def test_submitit_finds_the_executor_and_takes_its_parameters(tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="hpcgym")
    executor.update_parameters(name="mine", hpcgym_experiment="nowhere", hpcgym_overrides=["seed=3"])
    assert isinstance(executor._executor, HpcgymExecutor)
    assert executor._executor.parameters == {"name": "mine", "experiment": "nowhere", "overrides": ["seed=3"]}
    with pytest.raises(NameError, match="partition"):
        executor.update_parameters(hpcgym_partition="gpu")
    with pytest.raises(UserError, match="nodes"):
        executor.update_parameters(nodes=3)


def test_executor_never_offers_itself_for_functions(tmp_path: Path) -> None:
    assert submitit.AutoExecutor(folder=tmp_path).cluster != "hpcgym"
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="hpcgym")
    with pytest.raises(UserError, match="needs an experiment"):
        executor.submit(hpc_gym.run)
    executor.update_parameters(hpcgym_experiment="demo")
    with pytest.raises(UserError, match=r"submit hpc_gym\.run"):
        executor.submit(print, "hello")


def test_executor_submits_runs_of_an_experiment_as_a_sweep(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "cache"))
    for name in default_names("cpu"):
        spec = spec_of(name)  # looks built; the jobs are ended before they start anything in it
        spec.python.parent.mkdir(parents=True)
        (spec.root / MARKER).touch()
        spec.python.touch()
    executor = submitit.AutoExecutor(folder=tmp_path / "sweep", cluster="hpcgym")
    executor.update_parameters(hpcgym_experiment=str(project.write()), hpcgym_overrides=["seed=3"])
    with pytest.raises(UserError, match="would be called the same"):
        executor.map_array(hpc_gym.run, ["seed=1", "seed=2"])
    assert not (tmp_path / "sweep").exists()
    jobs = executor.map_array(hpc_gym.run, ["name=a", "name=b grpo.max_steps=7"])
    try:
        plans = [Plan.read(job.run_dir) for job in jobs]
        assert [(each.name, each.seed, each.training.grpo["max_steps"]) for each in plans] == [
            ("a", 3, 10),
            ("b", 3, 7),
        ]
        assert [job.run_dir for job in jobs] == [tmp_path / "sweep" / "a", tmp_path / "sweep" / "b"]
        assert all(isinstance(job, submitit.Job) and job.num_tasks == 3 for job in jobs)
        assert jobs[0].submission().args == (str(tmp_path / "sweep" / "a"),)
    finally:
        for job in jobs:
            local.kill(job.record)


def test_of_a_sweep_that_is_cut_short_the_runs_that_go_on_are_named(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit_prepared(request: Request) -> HpcgymJob:
        if request.plan.name == "c":
            raise UserError("Slurm refuses the job: too many")
        chain = ("9",) if request.plan.name == "b" else ()
        return HpcgymJob.of(JobRecord("7", "slurm", "x", request.plan.run_dir, "", "", 1, 0.0, chain=chain))

    monkeypatch.setattr(executor_module, "submit_prepared", submit_prepared)
    executor = submitit.AutoExecutor(folder=tmp_path / "sweep", cluster="hpcgym")
    executor.update_parameters(hpcgym_experiment=str(project.write()))
    with pytest.raises(UserError) as caught:
        executor.map_array(hpc_gym.run, [f"name={name}" for name in "abcd"])
    sweep = tmp_path / "sweep"
    assert str(caught.value).splitlines() == [
        "c: Slurm refuses the job: too many",
        "2 of the 4 runs are submitted, and go on:",
        f"  job 7: {sweep}/a",
        f"  job 7, 9: {sweep}/b",
        "To cancel them:",
        f"  hpc-gym cancel {sweep}/a",
        f"  hpc-gym cancel {sweep}/b",
    ]
    with pytest.raises(UserError, match=r"^Slurm refuses the job: too many$"):
        executor.submit(hpc_gym.run, "name=c")


def test_a_local_job_without_its_runtimes_is_refused_and_nothing_is_made(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "empty"))
    runs = project.folder / "runs"
    with pytest.raises(UserError, match="runtime gym: it is not built: hpc-gym runtimes build gym"):
        hpc_gym.submit(project.write())
    assert not runs.exists()


def test_what_the_package_offers_is_listed() -> None:
    assert {"submit", "run", "HpcgymJob", "UserError"} <= set(dir(hpc_gym))


def test_unknown_experiment_is_refused_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="demmo"):
        hpc_gym.submit("demmo")
    with pytest.raises(UserError, match=r"overrides must be a list of KEY=VALUE, .*, not 'seed=3'"):
        hpc_gym.submit("demo", "seed=3")
    assert list(tmp_path.iterdir()) == []


def request(run_dir: Path, **fields: object) -> Request:
    return Request(plan(run_dir, train=[[task("rank-0", "pass")]], **fields), "x", lambda: "name: x\n", "local")  # type: ignore[arg-type]


def test_slurm_that_is_not_there_or_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    wanted = request(tmp_path / "runs" / "x", launch=Launch(kind="slurm"))
    with pytest.raises(UserError, match="login node"):
        submit_request(wanted, Path.touch)
    (programs / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"^Slurm refuses the job: invalid partition specified: gpuu\.\n"):
        submit_request(wanted, Path.touch)
    assert list((tmp_path / "runs").iterdir()) == []


def test_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(submission, "snapshot", full)
    with pytest.raises(UserError, match="No space left on device"):
        submit_request(request(tmp_path / "runs" / "x"), Path.touch)
    assert list((tmp_path / "runs").iterdir()) == []


def test_snapshot_is_importable_and_says_where_it_comes_from(tmp_path: Path) -> None:
    source = snapshot(tmp_path / "code")
    code = "import hpc_gym, hpc_gym.shipped as s; print(hpc_gym.__file__, s.shipped('templates'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [f"{tmp_path}/code/hpc_gym/__init__.py", f"{tmp_path}/code/templates"]
    if (Path(hpc_gym.__file__).parents[1] / ".git").exists():
        assert source.commit is not None
        assert len(source.commit) == 40
    assert not list((tmp_path / "code").rglob("__pycache__/*.pyc.*"))


def test_run_directory_is_private_only_where_it_holds_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_gym.jobs.submission import _make_run_directory

    monkeypatch.setenv("A_TOKEN", "hunter2")
    monkeypatch.delenv("NOT_SET", raising=False)
    run_dir = tmp_path / "runs" / "x"
    _make_run_directory(request(run_dir, secrets=("A_TOKEN", "NOT_SET")), Path.touch, "local-1")
    assert stat.S_IMODE((run_dir / "secrets").stat().st_mode) == 0o700
    secret = run_dir / "secrets" / "submitted.json"
    assert (stat.S_IMODE(secret.stat().st_mode), secret.read_text()) == (0o600, '{"env": {"A_TOKEN": "hunter2"}}')
    assert stat.S_IMODE(run_dir.stat().st_mode) & 0o055 == 0o777 & ~submission._umask() & 0o055
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]


def test_a_judge_whose_key_is_not_set_is_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    wanted = request(tmp_path / "runs" / "x", secrets=("JUDGE_KEY",))
    rollout = replace(wanted.plan.rollout, judge=Judge("big", 5, "https://a.example/v1", "JUDGE_KEY"))
    wanted = replace(wanted, plan=replace(wanted.plan, rollout=rollout))
    with pytest.raises(UserError, match=r"judge.api_key_env: JUDGE_KEY is not set here"):
        submit_request(wanted, Path.touch)
    assert list((tmp_path / "runs").iterdir()) == []
