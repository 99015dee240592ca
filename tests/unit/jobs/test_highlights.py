from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from job_plans import plan, service, task

from hpc_gym.cli.live import LinePrinter
from hpc_gym.jobs.highlights import Highlights
from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.jobs.slurm import Standing
from hpc_gym.jobs.status import StatusReader
from hpc_gym.protocol.log_lines import log_name, stamp


def write(
    run_dir: Path, process: str, *lines: str, role: str = "train", node: str = "train-0", attempt: int = 1
) -> None:
    folder = run_dir / "attempts" / str(attempt) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / log_name(role, f"{role}-0", process)).open("ab") as file:
        file.writelines(stamp(time.time()) + line.encode() + b"\n" for line in lines)


def shown(highlights: Highlights, **how: bool) -> list[str]:
    # What has come is given out one look later.
    found = [*highlights.new(**how), *highlights.new(**how)]
    return [f"{each.file.process}: {each.text}" for each in found]


def test_steps_errors_and_our_own_warnings_are_shown_and_the_noise_is_not(tmp_path: Path) -> None:
    highlights = Highlights(tmp_path)
    write(tmp_path, "rank-0", "[INFO] wandb offline", "step 1/9 reward 0.5 2.10 s", "resuming from /checkpoint-3")
    write(tmp_path, "vllm-0", "(APIServer pid=7) WARNING 11-20 [a.py:1] no Triton", "INFO ok", role="rollout")
    write(tmp_path, "vllm-0", "(EngineCore pid=7) ERROR 11-20 [b.py:2] CUDA error: out of memory", role="rollout")
    write(tmp_path, "rollout-server", "WARNING NeMo Gym lost reasoning_gym", "INFO weights 2", role="rollout")
    assert shown(highlights) == [
        "rank-0: step 1/9 reward 0.5 2.10 s",
        "rank-0: resuming from /checkpoint-3",
        "vllm-0: CUDA error: out of memory",
        "rollout-server: WARNING NeMo Gym lost reasoning_gym",
    ]


def test_of_a_traceback_its_last_line_is_shown_once_however_often_it_comes(tmp_path: Path) -> None:
    highlights = Highlights(tmp_path)
    for number in range(50):
        where = f'  File "a.py", line {number}, in f'
        write(tmp_path, "rank-0", "Traceback (most recent call last):", where, f"ValueError: bad row {number}")
    assert shown(highlights) == ["rank-0: ValueError: bad row 0"]


def test_a_flood_of_different_errors_is_counted(tmp_path: Path) -> None:
    highlights = Highlights(tmp_path)
    write(tmp_path, "rank-0", *(f"ERROR {'x' * number}" for number in range(1, 31)))
    assert shown(highlights)[-1].endswith("x" * 8)
    write(tmp_path, "rank-0", *(f"ERROR {'y' * number}" for number in range(1, 31)))
    highlights.new()
    highlights.new()
    assert highlights.left_out == 22


def test_what_comes_while_the_attempt_is_stopped_and_what_was_there_before_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "rank-0", "ERROR of an attempt that is over")
    highlights = Highlights(tmp_path)
    write(tmp_path, "rank-0", "ERROR of the next attempt", attempt=2)
    assert shown(highlights) == ["rank-0: ERROR of the next attempt"]
    write(tmp_path, "rank-0", "ERROR connection closed by peer", "step 3/9 reward 1.0", attempt=2)
    assert shown(highlights, stopping=True) == ["rank-0: step 3/9 reward 1.0"]


@pytest.fixture
def record(tmp_path: Path) -> JobRecord:
    wanted = plan(tmp_path, [service("server", "")], [[task("rank-0", "")]], max_steps=9)
    (tmp_path / "plan.json").write_text(wanted.to_json())
    gone = ProcessIdentity(os.uname().nodename, "another life", 1, 1)
    return JobRecord("local-1", "local", "run", str(tmp_path), "demo", "local", 2, time.time(), gone)


def test_a_followed_job_tells_steps_restarts_and_its_requeue(record: JobRecord, tmp_path: Path) -> None:
    reader, printer = StatusReader(record), LinePrinter(Highlights(tmp_path))

    def happens(kind: str, attempt: int = 1, process: str = "", **fields: object) -> None:
        folder = tmp_path / "attempts" / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        latest = folder.parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(str(attempt))
        told = {"time": time.time(), "attempt": attempt, "node": "rollout-0", "role": "rollout", "process": process}
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(told | {"event": kind} | fields) + "\n")

    def said(state: str = "RUNNING") -> str:
        lines = [*printer.new_lines(reader.read(Standing(state))), *printer.new_lines(reader.read(Standing(state)))]
        return "\n".join(line.plain for line in lines)

    assert "queued: running, Priority" in _lines(printer, StatusReader(replace(record, kind="slurm")), "Priority")
    happens("began")
    happens("joined", host="gpu1")
    write(tmp_path, "rank-0", "step 1/9 reward 0.5")
    assert "train-0 rank-0: step 1/9 reward 0.5" in said()
    happens("restarting", process="server", cause="exit code 1: no memory")
    assert "note: server on rollout-0 is started again: exit code 1: no memory" in said()
    happens("stopping", reason="TO BE REQUEUED: preempted")
    assert "stopping: TO BE REQUEUED: preempted" in said()
    happens("began", attempt=2)
    write(tmp_path, "rank-0", "step 2/9 reward 0.6", attempt=2)
    told = said()
    assert "attempt 2\n" in told
    assert "attempt 1 ended at" in told
    assert "train-0 rank-0: step 2/9 reward 0.6" in told
    assert "job local-1 FAILED" in said("FAILED")


def _lines(printer: LinePrinter, reader: StatusReader, waiting: str) -> str:
    return "\n".join(line.plain for line in printer.new_lines(reader.read(Standing("PENDING", waiting))))
