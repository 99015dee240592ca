from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_gym.cli.main import run
from hpc_gym.errors import UserError
from hpc_gym.jobs import local, records
from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.jobs.state import job_state, standings
from hpc_gym.protocol.attempt import Outcome


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HPC_GYM_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def me() -> ProcessIdentity:
    identity = ProcessIdentity(os.uname().nodename, "", os.getpid(), 0)
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return replace(identity, boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(), started=started)


def make(folder: Path, name: str, **fields: object) -> JobRecord:
    (folder / name).mkdir(parents=True)
    record = JobRecord(f"local-{name}", "local", name, str(folder / name), "demo", "local", 3, time.time(), me())
    record = replace(record, **fields)  # type: ignore[arg-type]
    record.write()
    return record


def end(record: JobRecord, outcome: Outcome) -> None:
    folder = Path(record.run_dir) / "attempts" / "1"
    folder.mkdir(parents=True)
    outcome.write(record.run_dir, folder)
    (folder.parent / "latest").symlink_to("1")


def test_record_reads_what_it_writes_also_from_a_copied_directory(runs: Path) -> None:
    record = make(runs, "one")
    assert JobRecord.read(runs / "one") == record
    (runs / "one").rename(runs / "moved")
    assert JobRecord.read(runs / "moved") == replace(record, run_dir=str(runs / "moved"))


def test_newest_run_comes_first_and_one_here_has_the_name_when_two_share_it(runs: Path, tmp_path: Path) -> None:
    here = make(runs, "twice", submitted=1.0)
    later = make(tmp_path / "elsewhere", "twice", submitted=2.0, job_id="local-later")
    records.remember_runs_folder(tmp_path / "elsewhere")
    records.remember_runs_folder(tmp_path / "elsewhere")
    assert [record.submitted for record in records.all_records()] == [2.0, 1.0]
    assert records.find("twice") == records.find("twice", only=True) == here
    assert records.find("latest") == records.find("local-later") == later


def test_a_name_that_several_runs_elsewhere_have_is_refused_for_what_cannot_be_undone(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for moment, folder in enumerate(folders):
        make(folder, "rev", submitted=float(moment), job_id=f"{moment}")
        records.remember_runs_folder(folder)
    assert records.find("rev").run_dir == str(tmp_path / "two" / "rev")
    with pytest.raises(UserError, match="several runs are called 'rev'") as caught:
        records.find("rev", only=True)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        str(folder / "rev") for folder in reversed(folders)
    ]
    assert records.find(str(tmp_path / "one" / "rev"), only=True).job_id == "0"


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_the_commands_that_cannot_be_undone_want_one_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        make(tmp_path / name, "rev", process=replace(me(), started=1))
        records.remember_runs_folder(tmp_path / name)
    assert run([command, "rev"]) == 2
    assert "several runs are called 'rev'" in capsys.readouterr().err


def test_a_component_of_a_heterogeneous_job_names_the_job(runs: Path) -> None:
    record = make(runs, "het", job_id="4242", chain=("4243",))
    assert records.find("4242+0") == records.find("4243+1") == record
    with pytest.raises(UserError, match="no job '42\\+0'"):
        records.find("42+0")


def test_what_is_no_run_is_passed_over(runs: Path) -> None:
    make(runs, "good")
    (runs / "empty").mkdir()
    (runs / "torn").mkdir()
    (runs / "torn" / "job.json").write_text('{"job_id": "local')
    (runs / "other").mkdir()
    (runs / "other" / "job.json").write_text('["of another program"]')
    assert [record.name for record in records.all_records()] == ["good"]


def test_records_that_cannot_be_read_are_named_and_foreign_folders_are_not(runs: Path) -> None:
    make(runs, "good")
    for name, text in {"torn": b'{"job_id": "lo', "other": b'["of another program"]', "binary": b"\xff\xfe"}.items():
        (runs / name).mkdir()
        (runs / name / "job.json").write_bytes(text)
    (runs / "folder" / "job.json").mkdir(parents=True)
    (runs / "gone").symlink_to(runs / "deleted")
    (runs / "round").symlink_to("round")
    (runs / "notes.txt").write_text("mine")
    found = records.look()
    assert [record.name for record in found.records] == ["good"]
    named = [sentence.partition("/job.json")[0].rpartition("/")[2] for sentence in found.unreadable]
    assert named == ["binary", "folder", "other", "round", "torn"]


def test_a_run_seen_through_a_link_is_listed_once(runs: Path) -> None:
    make(runs, "good")
    (runs / "newest").symlink_to("good")
    assert [record.run_dir for record in records.all_records()] == [str(runs / "good")]


def test_an_outcome_that_cannot_be_read_is_none(runs: Path) -> None:
    record = make(runs, "good", process=replace(me(), started=1))
    end(record, Outcome("completed"))
    (runs / "good" / "attempts" / "1" / "outcome.json").write_text("[]")
    assert job_state(record) == "FAILED"


@pytest.mark.parametrize("job", ["goood", "local-goof"])
def test_unknown_job_is_refused_with_the_nearest_names(runs: Path, job: str) -> None:
    make(runs, "good")
    with pytest.raises(UserError, match=rf"no job '{job}'.*good"):
        records.find(job)


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        records.find(str(tmp_path))


def test_state_is_of_that_very_process_not_of_the_next_with_its_id(runs: Path) -> None:
    living = make(runs, "living")
    assert job_state(living) == "RUNNING"
    assert local.is_alive(replace(me(), started=me().started + 1)) is False
    assert local.is_alive(replace(me(), boot="another life")) is False
    assert local.is_alive(replace(me(), host="another-host")) is None


def test_state_after_the_process_comes_from_the_outcome(runs: Path) -> None:
    gone = replace(me(), started=1)
    completed = make(runs, "completed", process=gone)
    end(completed, Outcome("completed"))
    cancelled = make(runs, "cancelled", process=gone)
    end(cancelled, Outcome("cancelled", "SIGTERM"))
    silent = make(runs, "silent", process=gone)
    assert [job_state(each) for each in (completed, cancelled, silent)] == ["COMPLETED", "CANCELLED", "FAILED"]
    told = standings([completed, silent])
    assert {key: each.state for key, each in told.items()} == {completed.run_dir: "COMPLETED", silent.run_dir: "FAILED"}


def test_job_ids_never_repeat() -> None:
    assert len({local.new_job_id() for _ in range(2000)}) == 2000


def test_a_thousand_runs_are_listed_in_a_second(runs: Path) -> None:
    for number in range(1000):
        record = make(runs, f"run-{number}", submitted=float(number), process=replace(me(), started=1))
        end(record, Outcome("completed"))
    begin = time.monotonic()
    listed = records.all_records()
    told = standings(listed)
    assert time.monotonic() - begin < 1.0
    assert {each.state for each in told.values()} == {"COMPLETED"}
    assert [record.name for record in listed[:2]] == ["run-999", "run-998"]
