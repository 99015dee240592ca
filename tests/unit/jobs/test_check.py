from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_project import Project

from hpc_gym.cli.main import run
from hpc_gym.errors import UserError
from hpc_gym.jobs.check import check_experiment
from hpc_gym.jobs.findings import Finding
from hpc_gym.jobs.slurm_values import minutes
from hpc_gym.jobs.storage_check import size_text


def found(findings: list[Finding], check: str) -> Finding:
    return next(each for each in findings if each.check == check)


def test_a_local_experiment_is_looked_at_from_runtimes_to_room(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "cache"))
    findings = check_experiment(project.write())
    assert found(findings, "experiment").detail == "small: 1 rollout, 2 train node(s), 2 training rank(s)"
    assert found(findings, "runtime gym") == Finding(
        "runtime gym", "failed", "it is not built: hpc-gym runtimes build gym"
    )
    assert found(findings, "training data").detail.startswith("reasoning_gym: 2 rows")
    assert found(findings, "held-out data").status == "warning"
    assert found(findings, "run directory") == Finding("run directory", "ok", str(tmp_path / "runs" / "small"))
    assert found(findings, "room").status == "ok"
    assert not any(each.check == "slurm" for each in findings)


def test_a_run_name_that_exists_is_found(project: Project) -> None:
    (project.folder / "runs" / "small").mkdir(parents=True)
    assert found(check_experiment(project.write()), "run directory").status == "failed"


def test_too_little_room_for_the_checkpoints_is_found(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with (project.folder / "model" / "model.safetensors").open("r+b") as weights:
        weights.truncate(shutil.disk_usage(project.folder).free)
    assert found(check_experiment(project.write()), "room").status == "failed"


def test_what_is_missing_hides_nothing_of_the_rest(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (project.folder / "mcqa.jsonl").unlink()
    shutil.rmtree(project.folder / "model")
    findings = check_experiment(project.write(), ["cluster.kind=slurm", "checkpoints.every=0", "nodes.train=5"])
    failed = {each.check for each in findings if each.status == "failed"}
    assert failed >= {"model", "training data", "experiment", "slurm"}
    assert "small.yaml:" in found(findings, "model").detail
    assert "mcqa.jsonl" in found(findings, "training data").detail
    assert [each.detail[:20] for each in findings if each.status == "ok" and each.check == "training data"] == [
        "reasoning_gym: 2 row"
    ]
    assert found(findings, "room").status == "ok"


def test_a_hub_model_that_only_this_shell_would_find_is_found(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    wanted = ["cluster.kind=slurm", "model.path=org/name"]
    absent = found(check_experiment(project.write(), wanted), "model")
    assert absent.status == "failed"
    assert "hf download org/name" in absent.detail
    snapshot = tmp_path / "hub home" / "hub" / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    here_only = found(check_experiment(project.write(), wanted), "model")
    assert here_only.status == "failed"
    assert "set cluster.env.HF_HOME" in here_only.detail
    named = [*wanted, f"cluster.env.HF_HOME={tmp_path / 'hub home'}"]
    assert found(check_experiment(project.write(), named), "model").status == "ok"


def test_what_lies_on_this_machine_alone_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_gym.jobs.storage_check._NODE_LOCAL_FOLDERS", (str(project.folder.parent),))
    monkeypatch.setattr("hpc_gym.jobs.storage_check._NODE_LOCAL_TYPES", ())
    seen = found(check_experiment(project.write(), ["cluster.kind=slurm"]), "seen by the nodes")
    assert seen.status == "warning"
    assert str(project.folder / "model") in seen.detail
    assert found(check_experiment(project.write(), ["cluster.kind=slurm"]), "run directory").status == "warning"
    assert not any(each.check == "seen by the nodes" for each in check_experiment(project.write()))


def test_without_slurm_a_slurm_job_cannot_be_checked_further(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    last = check_experiment(project.write(), ["cluster.kind=slurm"])[-1]
    assert last.status == "failed"
    assert last.detail.startswith("not on PATH: sbatch")


def test_the_command_exits_with_1_when_a_check_failed_and_2_when_the_experiment_is_wrong(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "cache"))
    assert run(["check", str(project.write()), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert {
        "check": "runtime gym",
        "status": "failed",
        "detail": "it is not built: hpc-gym runtimes build gym",
    } in printed
    assert run(["check", str(project.write()), "grpo.max_step=3"]) == 2
    with pytest.raises(UserError, match="max_step"):
        check_experiment(project.write(), ["grpo.max_step=3"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("30", 30),
        ("90:30", 90.5),
        ("12:30:00", 750),
        ("1-0", 1440),
        ("2-12:30", 3630),
        ("1-00:00:30", 1440.5),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, expected: float) -> None:
    assert minutes(text) == expected


def test_each_finding_is_one_line_for_a_program_and_paths_stay_whole(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run(["check", str(project.write()), "nodes.train=3", "grpo.num_generations=3"])
    lines = capsys.readouterr().out.splitlines()
    assert f"  ok       {project.folder / 'runs' / 'small'}" in next(line for line in lines if "run directory" in line)
    assert any(line.endswith(f"3 rows, {project.folder / 'mcqa.jsonl'}") for line in lines)


def test_sizes_are_told_as_people_read_them() -> None:
    assert [size_text(2_100_000), size_text(8_044_000_000)] == ["2.1 MB", "8.0 GB"]
