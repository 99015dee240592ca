from __future__ import annotations

import json
import platform
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_jobs import make_plan, task

from hpc_gym.errors import UserError
from hpc_gym.node.attempt import begin
from hpc_gym.node.environment import process_environment
from hpc_gym.plan.plan import Launch
from hpc_gym.protocol.attempt import Failure, Outcome
from hpc_gym.protocol.secrets import read_secrets


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    plan = replace(make_plan(tmp_path, ([task("rank-0", "pass")],)), secrets=("WANDB_API_KEY", "HF_TOKEN"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    return tmp_path


def test_every_attempt_has_a_number_a_directory_and_a_token_of_its_own(run_dir: Path) -> None:
    tokens = set()
    for number in ("1", "2", "3"):
        exports = begin(run_dir, {})
        assert exports["HPC_GYM_ATTEMPT"] == number
        host, _, port = exports["HPC_GYM_COORDINATOR"].rpartition(":")
        assert host == "127.0.0.1"
        assert 20480 <= int(port) < 32768
        assert (run_dir / "attempts/latest/logs").resolve() == run_dir / "attempts" / number / "logs"
        tokens.add(read_secrets(run_dir / f"secrets/attempt-{number}.json").token)
    assert len(tokens) == 3


def test_secrets_come_from_the_submission_first_and_only_we_can_read_them(run_dir: Path) -> None:
    (run_dir / "secrets").mkdir(mode=0o755)
    (run_dir / "secrets/submitted.json").write_text(json.dumps({"env": {"WANDB_API_KEY": "at submit"}}))
    begin(run_dir, {"WANDB_API_KEY": "of the shell", "HF_TOKEN": "hub", "OTHER": "x"})
    path = run_dir / "secrets/attempt-1.json"
    assert read_secrets(path).env == {"WANDB_API_KEY": "at submit", "HF_TOKEN": "hub"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_failure_of_the_attempt_before_is_no_longer_at_the_top(run_dir: Path) -> None:
    (run_dir / "failure.json").write_text("{}")
    begin(run_dir, {})
    assert not (run_dir / "failure.json").exists()


def test_the_script_gets_exports_and_no_secret(run_dir: Path) -> None:
    begin_attempt = f"{shlex.quote(sys.executable)} -m hpc_gym.node.attempt {shlex.quote(str(run_dir))}"
    shell = f'exports="$({begin_attempt})"; eval "$exports"; echo "$exports"; env'
    env = {"PATH": "/usr/bin:/bin", "WANDB_API_KEY": "planted", "PYTHONPATH": str(Path(__file__).parents[3])}
    out = subprocess.run(
        ["bash", "-euc", shell], env=env, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert "HPC_GYM_ATTEMPT=1\n" in out
    assert "planted" not in out
    assert "WANDB_API_KEY=" not in out
    assert read_secrets(run_dir / "secrets/attempt-1.json").token not in out


def test_a_directory_without_a_plan_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run directory that can be started: plan.json"):
        begin(tmp_path, {})


def test_an_attempt_leaves_where_it_ran_in_the_manifest(run_dir: Path) -> None:
    manifest = run_dir / "manifest.json"
    manifest.write_text('{"name": "a", "attempts": {}}')
    begin(run_dir, {"HPC_GYM_JOB_ID": "local-7"})
    begin(run_dir, {"HPC_GYM_JOB_ID": "local-8"})
    attempts = json.loads(manifest.read_text())["attempts"]
    assert [(number, each["job"]) for number, each in attempts.items()] == [("1", "local-7"), ("2", "local-8")]
    assert attempts["1"]["nodes"] == [platform.node()]
    assert len(attempts["1"]["plan"]) == 64
    manifest.write_text("{")
    assert begin(run_dir, {})["HPC_GYM_ATTEMPT"] == "3"


LOGIN_SHELL = {
    "PATH": "/bin",
    "HPC_GYM_CACHE": "/cache",
    "CUDA_VISIBLE_DEVICES": "0",
    "GITHUB_TOKEN": "x",
    "OPENAI_API_KEY": "x",
    "HF_TOKEN": "x",
    "SITE_VARIABLE": "y",
    "PYTHONPATH": "/elsewhere",
    "VIRTUAL_ENV": "/elsewhere",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "7",
}


def test_a_local_process_inherits_little_of_a_login_shell(run_dir: Path) -> None:
    plan = replace(make_plan(run_dir, ([task("rank-0", "pass")],)), secrets=("HF_TOKEN",), env={"A": "plan"})
    env = process_environment(plan, LOGIN_SHELL, {"HF_TOKEN": "of the file"}, {"B": "own"})
    expected = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "A": "plan", "B": "own", "HF_TOKEN": "of the file"}
    assert env == {**expected, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": "/cache/torchinductor"}


def test_a_slurm_process_inherits_what_the_site_set_up(run_dir: Path) -> None:
    plan = replace(make_plan(run_dir, ([task("rank-0", "pass")],)), launch=Launch(kind="slurm"))
    env = process_environment(plan, LOGIN_SHELL, {}, {})
    ours = {"PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR"}
    assert set(env) == {"PATH", "CUDA_VISIBLE_DEVICES", "SITE_VARIABLE", "SLURM_JOB_ID", *ours}


@pytest.mark.parametrize("kind, code", [("completed", 0), ("failed", 1), ("cancelled", 130)])
def test_a_job_that_is_started_again_after_the_end_of_its_run_ends_as_the_run_did(
    run_dir: Path, kind: str, code: int
) -> None:
    begin(run_dir, {})
    failure = Failure("train", "train-0", "rank-0", "boom", "/log", 1, 0.0, 1)
    ended = Outcome(kind, failure=failure if kind == "failed" else None)  # type: ignore[arg-type]
    ended.write(run_dir, run_dir / "attempts" / "1")
    script = f'eval "$({shlex.quote(sys.executable)} -m hpc_gym.node.attempt {shlex.quote(str(run_dir))})"; exit 77'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == f"nothing to go on with: the run has ended. {ended.sentence()}\n"
    assert not (run_dir / "attempts" / "2").exists()
