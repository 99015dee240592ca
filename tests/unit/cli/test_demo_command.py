"""The demo's command: what it prints, and what it refuses before it takes any time."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.cli.demo import HELD_OUT
from hpc_gym.cli.demo_view import print_report
from hpc_gym.cli.main import run
from hpc_gym.data import demo_rows
from hpc_gym.jobs.demo_inputs import DemoInputs
from hpc_gym.jobs.report import EnvironmentReport, Gain, Report

GAIN = Gain(mean=0.231, low=0.152, high=0.31, rows=200)


def test_the_table_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    environment = EnvironmentReport("example_session_state_mgmt", 0.471, 0.752, 0.52, 0.75, GAIN)
    other = EnvironmentReport("sums", 0.4, 0.5, None, None, None)
    seconds = {"start-up": 31.5, "training": 150.0}
    print_report(Report(Path("/runs/demo"), 36, (environment, other), GAIN, 3.2e-7, 0, seconds), Path("/c.png"), 12.0)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "0.47 → 0.75   0.52 → 0.75   +0.23 [+0.15, +0.31]" in said
    for words in ("3.2e-07", "training 2 min 30 s", "/c.png", "/runs/demo", "together"):
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["grpo.max_stps=3"], "did you mean 'max_steps'?"),
        (["grpo.num_generations=7"], "grpo.num_generations: 7 must divide"),
        (["--run-name", "a/b"], "must be usable as a folder's name"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path / "cache"))
    assert run(["demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert "there is no" not in told  # the model and the rows are not expected yet
    assert not (tmp_path / "cache").exists()


def test_a_run_name_that_is_taken_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo-x").mkdir()
    assert run(["demo", "--run-name", "demo-x", f"cluster.runs_dir={tmp_path}"]) == 2
    assert "demo-x" in capsys.readouterr().err


def test_inputs_of_another_seed_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path))
    first, second = DemoInputs.of(1), DemoInputs.of(2)
    assert first.folder != second.folder
    assert first.folder == DemoInputs.of(1).folder
    for inputs in (first, second):
        inputs.folder.mkdir(parents=True)
        inputs.write_rows()
        assert (tmp_path / "demo" / "latest").resolve() == inputs.folder
    assert not first.has_model


def test_fewer_held_out_rows_are_the_first_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(tmp_path))
    inputs = DemoInputs.of(1)
    inputs.write_rows()
    assert len(inputs.overrides(HELD_OUT)) == 2
    assert any(override.startswith("data.eval=") for override in inputs.overrides(7))
    for environment in demo_rows.ENVIRONMENTS:
        few, all_rows = (
            (inputs.folder / "data" / f"{environment}-held-out{suffix}.jsonl").read_text().splitlines()
            for suffix in ("-7", "")
        )
        assert few == all_rows[:7]


def test_the_option_knows_how_many_rows_are_held_out() -> None:
    assert HELD_OUT == demo_rows.HELD_OUT
