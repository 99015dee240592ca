"""Local jobs of small real programs under the real supervisors: submit, states, results, failure, cancel, logs."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_plans import notifying, plan, service, task

from hpc_gym.errors import UserError
from hpc_gym.jobs import local, records
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.submit import submit_prepared
from hpc_gym.plan.plan import Launch, Plan, Process

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

HPC_GYM = [sys.executable, "-m", "hpc_gym.cli.main"]
FOREVER = "import time\nprint('serving', flush=True)\ntime.sleep(600)"
STUBBORN = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{FOREVER}"
TRAIN = """
import json, os, time
from hpc_gym.protocol.notify import notify
notify(READY=1)
for step in range(1, 5):
    line = {"attempt": 1, "step": step, "max_steps": 4, "time": time.time(), "reward": step / 4}
    with open(os.environ["HPC_GYM_RUN_DIR"] + "/metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    print("trained step", step, flush=True)
"""


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HpcgymJob]]:
    """The jobs of a test, none of which outlives it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HPC_GYM_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    jobs: list[HpcgymJob] = []
    yield jobs
    for job in jobs:
        local.kill(job.record)


def submit(jobs: list[HpcgymJob], wanted: Plan) -> HpcgymJob:
    jobs.append(submit_prepared(Request(wanted, "by-hand", lambda: "name: by-hand\n", "local")))
    return jobs[-1]


def training(code: str = TRAIN) -> list[list[Process]]:
    return [[notifying("rank-0", code)], [task("rank-1", "print('also trained', flush=True)")]]


def wait_for_log(job: HpcgymJob, text: str) -> None:
    deadline = time.monotonic() + 40
    while not any(text in line for line in job.logs()):
        assert not job.done(), job.stdout()
        assert time.monotonic() < deadline, f"'{text}' never came"
        time.sleep(0.1)


def hpc_gym(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HPC_GYM, *arguments], capture_output=True, text=True, timeout=60, check=False)


def state_from_another_process(job: HpcgymJob) -> str:
    code = "import sys; from hpc_gym.jobs.job import HpcgymJob; print(HpcgymJob.find(sys.argv[1]).state)"
    asked = subprocess.run([sys.executable, "-c", code, str(job.run_dir)], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def test_job_runs_to_its_result_and_leaves_its_story(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    secret = "correct-horse-battery"
    os.environ["A_SECRET"] = secret
    try:
        wanted = plan(tmp_path / "runs" / "good", [service("vllm-0", FOREVER)], training(), secrets=("A_SECRET",))
        job = submit(submitted, wanted)
    finally:
        del os.environ["A_SECRET"]
    assert (job.run_dir / "job.sh").read_text() == render(wanted)
    assert Plan.read(job.run_dir) == wanted
    assert stat.S_IMODE((job.run_dir / "secrets").stat().st_mode) == 0o700
    assert job.state == "RUNNING"
    assert state_from_another_process(job) == "RUNNING"
    assert job.result() == {"outcome": "completed", "steps": 4, "attempts": 1, "run_dir": str(job.run_dir)}
    assert job.results() == [job.result()] * 3
    assert job.exception() is None
    assert (job.state, state_from_another_process(job)) == ("COMPLETED", "COMPLETED")
    assert (job.stdout() or "").splitlines()[-1] == "COMPLETED"
    assert {pickle.name for pickle in (job.run_dir / "submitit").glob("*_result.pkl")} == {
        f"{job.job_id}_{rank}_result.pkl" for rank in range(3)
    }
    lines = list(job.logs())
    assert [line.split()[-1] for line in lines if " train-0 rank-0 " in line] == ["1", "2", "3", "4"]
    assert lines[-1] == "COMPLETED"
    stages = {stage.name: stage.state for stage in job.status().stages}
    assert (stages["nodes"], stages["training"], stages["vLLM"]) == ("done", "done", "done")
    manifest = json.loads((job.run_dir / "manifest.json").read_text())
    assert manifest["packages"]["submitit"]
    assert (job.run_dir / "code" / "hpc_gym" / "node" / "supervisor.py").is_file()
    told = [path for path in job.run_dir.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert told == []
    assert local.processes(job.record) == []


def test_exception_names_the_first_cause(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    bad = "import time\ntime.sleep(1)\nraise ValueError('row 17 has no question')"
    job = submit(submitted, plan(tmp_path / "runs" / "bad", [service("vllm-0", FOREVER)], [[task("rank-0", bad)]]))
    error = job.exception()
    assert error is not None
    for told in ("role train", "node train-0", "process rank-0", "exited with code 1", "row 17 has no question"):
        assert told in str(error)
    with pytest.raises(type(error), match="row 17"):
        job.result()
    assert job.state == "FAILED"
    found = list(job.logs(errors_only=True))
    assert found[0] == "== attempt 1, first cause =="
    assert any("ValueError: row 17" in line for line in found)
    assert found[-1].startswith("FAILED: role train, node train-0, process rank-0")
    assert job.status().outcome == found[-1]
    assert "failed" in {stage.state for stage in job.status().stages}


def test_job_script_that_cannot_begin_is_a_failure_with_its_words(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    launch = Launch(kind="local", setup=("echo no such module >&2", "false"))
    job = submit(submitted, plan(tmp_path / "runs" / "unstarted", train=training(), launch=launch))
    assert "no such module" in str(job.exception())
    assert job.state == "FAILED"
    assert "no such module" in (job.status().outcome or "")
    assert list(job.logs()) == ["job script: no such module"]


def test_cancel_stops_everything_even_what_ignores_it(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    job = submit(submitted, plan(tmp_path / "runs" / "long", [service("vllm-0", STUBBORN)], training(FOREVER)))
    wait_for_log(job, "serving")
    cancelled = hpc_gym("cancel", "long")
    assert cancelled.returncode == 0
    assert "nothing of it is left on this machine" in cancelled.stdout
    assert job.state == "CANCELLED"
    assert local.processes(job.record) == []
    assert "CANCELLED" in str(job.exception())
    assert list(job.logs())[-1].startswith("CANCELLED")


def test_ctrl_c_leaves_the_view_and_the_job_goes_on(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    job = submit(submitted, plan(tmp_path / "runs" / "seen", train=training(FOREVER)))
    wait_for_log(job, "serving")
    with subprocess.Popen([*HPC_GYM, "status", "--follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as view:
        assert view.stdout is not None
        assert b"queued" in view.stdout.readline()
        view.send_signal(signal.SIGINT)
        _, told = view.communicate(timeout=20)
    assert view.returncode == 130
    assert b"goes on" in told
    assert b"Traceback" not in told
    assert job.state == "RUNNING"
    job.cancel()


def test_killed_job_script_is_a_failure_seen_from_anywhere(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    job = submit(submitted, plan(tmp_path / "runs" / "killed", train=training(FOREVER)))
    wait_for_log(job, "serving")
    process = job.record.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while local.processes(job.record) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert local.processes(job.record) == []
    assert job.state == state_from_another_process(job)
    assert job.state in ("FAILED", "CANCELLED")


def test_follow_shows_lines_within_a_second_and_ends_with_the_job(tmp_path: Path, submitted: list[HpcgymJob]) -> None:
    said = "import time\nfor i in range(5):\n    print('said', time.time(), flush=True)\n    time.sleep(0.5)"
    job = submit(submitted, plan(tmp_path / "runs" / "talk", train=[[task("rank-0", said)]]))
    lags: list[float] = []
    lines: list[str] = []

    def read() -> None:
        for line in job.logs(follow=True):
            lines.append(line)
            if "said" in line:
                lags.append(time.time() - float(line.split()[-1]))

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(60)
    assert not reader.is_alive()
    assert len(lags) == 5
    assert max(lags) < 1.0
    assert lines[-1] == "COMPLETED"


def test_taken_name_is_refused_and_a_submit_that_fails_leaves_nothing(
    tmp_path: Path, submitted: list[HpcgymJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(tmp_path / "runs" / "once", train=training())
    job = submit(submitted, wanted)
    with pytest.raises(UserError, match="the run 'once' exists"):
        submit(submitted, wanted)
    job.cancel()

    def no_process(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(OSError, match="temporarily"):
        submit(submitted, plan(tmp_path / "runs" / "never", train=training()))
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["once"]


def test_jobs_are_found_by_id_name_directory_and_latest(
    tmp_path: Path, submitted: list[HpcgymJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(submitted, plan(tmp_path / "runs" / "mine", train=[[task("rank-0", "pass")]]))
    job.wait()
    monkeypatch.chdir(job.run_dir)
    for name in (job.job_id, "mine", str(job.run_dir), ".", "latest"):
        assert records.find(name).job_id == job.job_id
    with pytest.raises(UserError, match=r"no job 'mina'.*Nearest: mine"):
        records.find("mina")
