"""The command line through its real entry point: exit codes, messages, speed of nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from job_plans import plan, task
from small_project import Project

from hpc_gym.cli.main import COMMANDS
from hpc_gym.cli.submit import _say
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.protocol.log_lines import stamp

HPC_GYM = [sys.executable, "-m", "hpc_gym.cli.main"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "HPC_GYM_RUNS": str(tmp_path / "runs")}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has ended, with one log."""
    folder = tmp_path / "runs" / "past"
    logs = folder / "attempts" / "1" / "logs"
    logs.mkdir(parents=True)
    (folder / "attempts" / "latest").symlink_to("1")
    (folder / "plan.json").write_text(plan(folder, train=[[task("rank-0", "pass")]]).to_json())
    (logs / "train-0-rank-0.log").write_bytes(b"".join(stamp(1.79e9 + n) + b"line %d\n" % n for n in range(50_000)))
    gone = ProcessIdentity(os.uname().nodename, "another life", 1, 1)
    JobRecord("local-7", "local", "past", str(folder), "demo", "local", 1, time.time(), gone).write()
    return folder


def hpc_gym(environment: dict[str, str], *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HPC_GYM, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_help_names_every_command_without_importing_one(environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom hpc_gym.cli.main import run\nassert run(['--help']) == 0\n"
        "heavy = {'rich', 'pydantic', 'omegaconf', 'jinja2', 'submitit', 'numpy', 'aiohttp', 'hpc_gym.jobs'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "heavy: []"
    for name, command in COMMANDS.items():
        assert f"  {name} " in told.stdout
        assert command.summary in told.stdout


def test_importing_the_package_imports_nothing(environment: dict[str, str]) -> None:
    code = (
        "import sys; before = set(sys.modules); import hpc_gym\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new), sorted(name for name in sys.modules if name.startswith('hpc_gym')))"
    )
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "['hpc_gym'] ['hpc_gym', 'hpc_gym.errors']"


@pytest.mark.parametrize("name", [*sorted(set(COMMANDS) - {"runtimes"}), "runtimes build", "runtimes list"])
def test_every_command_has_help_with_examples(name: str, environment: dict[str, str]) -> None:
    told = hpc_gym(environment, *name.split(), "--help")
    assert told.returncode == 0
    # In the usage, and in an example.
    assert told.stdout.count(f"hpc-gym {name}") >= 2
    assert told.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sumbit"], "Did you mean 'submit'"),
        (["submit", "demmo"], "demmo"),
        (["submit", "demo", "--dry-run", "rollouts.temprature=1"], "did you mean 'temperature'"),
        (["status", "pst"], "Nearest: past"),
        (["logs", "nowhere"], "no job 'nowhere'"),
        (["logs", "past", "--role", "judge"], "no role 'judge'; it has: train"),
        (["logs", "past", "--attempt", "4"], "no attempt 4; it has: 1"),
        (["logs", "past", "--errors", "--follow"], "choose one"),
        (["cancel", "nowhere"], "no job 'nowhere'"),
        (["status", "--nonsense"], "No such option"),
        (["submit", "demo", "--json", "--follow"], "choose one"),
        (["resume", "past", "--json", "--follow"], "choose one"),
    ],
)
def test_wrong_requests_get_a_sentence_and_exit_code_2(
    arguments: list[str], told: str, environment: dict[str, str], run_dir: Path, tmp_path: Path
) -> None:
    answer = hpc_gym(environment, *arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_facts_are_printed_as_json_when_asked(environment: dict[str, str], run_dir: Path) -> None:
    (listed,) = json.loads(hpc_gym(environment, "list", "--json").stdout)
    assert (listed["name"], listed["state"], listed["run_dir"]) == ("past", "FAILED", str(run_dir))
    status = json.loads(hpc_gym(environment, "status", "--json").stdout)
    assert (status["name"], status["state"]) == ("past", "FAILED")
    cancelled = hpc_gym(environment, "cancel", "past", "--json")
    assert cancelled.returncode == 0
    assert json.loads(cancelled.stdout)["gone"] is True


def test_list_and_status_read_well_without_a_terminal(environment: dict[str, str], run_dir: Path) -> None:
    listed = hpc_gym(environment, "list").stdout.splitlines()
    assert listed[0].split()[:3] == ["NAME", "STATE", "SUBMITTED"]
    assert listed[1].startswith("past  FAILED")
    status = hpc_gym(environment, "status", "past")
    assert "training" in status.stdout
    assert "\x1b" not in status.stdout


def test_following_a_job_that_failed_exits_with_1(environment: dict[str, str], run_dir: Path) -> None:
    told = hpc_gym(environment, "status", "past", "--follow")
    assert told.returncode == 1
    assert "job local-7 FAILED" in told.stdout


def test_reader_that_goes_away_is_no_error(environment: dict[str, str], run_dir: Path) -> None:
    command = f"{sys.executable} -m hpc_gym.cli.main logs past | head -n 2"
    told = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert len(told.stdout.splitlines()) == 2
    assert told.stderr == ""


def test_ctrl_c_is_quiet_and_exits_with_130(environment: dict[str, str], run_dir: Path) -> None:
    record = JobRecord.read(run_dir)
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    me = ProcessIdentity(os.uname().nodename, boot, os.getpid(), started)
    JobRecord(**{**vars(record), "process": me}).write()
    with subprocess.Popen(
        [*HPC_GYM, "logs", "past", "--follow"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as following:
        assert following.stdout is not None
        assert following.stdout.readline()
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=20)
    assert (following.returncode, errors) == (130, b"")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("hpc-gym st", "status"),
        ("hpc-gym status pa", "past"),
        ("hpc-gym submit five", "five-node"),
        ("hpc-gym submit demo --cluster loc", "local"),
        ("hpc-gym submit {folder}/mi", "{folder}/mine.yaml"),
        ("hpc-gym submit {folder}/o", "{folder}/other.yml"),
        ("hpc-gym submit {folder}/fol", "{folder}/folder/"),
        ("hpc-gym submit demo --cluster {folder}/mi", "{folder}/mine.yaml"),
        ("hpc-gym submit ./[", "./[1].yaml"),
        ("hpc-gym submit a**b", None),
    ],
)
def test_names_are_completed(
    words: str, offered: str | None, environment: dict[str, str], run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("mine.yaml", "other.yml", "[1].yaml", "mine.txt"):
        (tmp_path / name).touch()
    words = words.format(folder=tmp_path)
    asked = {"_HPC_GYM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    told = hpc_gym(environment | asked, cwd=tmp_path)
    assert "Traceback" not in told.stderr
    if offered is None:
        assert told.stdout.split() == []
    else:
        assert offered.format(folder=tmp_path) in told.stdout.split()
    assert f"{tmp_path}/mine.txt" not in told.stdout.split()


def test_runs_whose_record_cannot_be_read_are_named_beside_the_list(
    environment: dict[str, str], run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "job.json").write_text('{"job_id": ')
    told = hpc_gym(environment, "list", "--json")
    assert [each["name"] for each in json.loads(told.stdout)] == ["past"]
    assert "not listed: " in told.stderr
    assert "torn/job.json" in told.stderr


def test_output_that_cannot_be_written_is_told_without_a_traceback(environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        told = subprocess.run(
            [*HPC_GYM, "--help"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (told.returncode, told.stderr) == (1, "hpc-gym: No space left on device: the output could not be written\n")
    closed = ["bash", "-c", 'exec "$@" >&-', "bash", *HPC_GYM, "list"]
    told = subprocess.run(closed, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert "Traceback" not in told.stderr


def test_a_file_that_cannot_be_looked_at_is_a_sentence(project: Project, environment: dict[str, str]) -> None:
    name = "d" * 300
    runs = f"cluster.runs_dir={project.folder / name}"
    told = hpc_gym(environment, "submit", "small.yaml", runs, "--dry-run", cwd=project.folder)
    assert (told.returncode, "Traceback" in told.stderr) == (2, False)
    assert name in told.stderr and "File name too long" in told.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal_of_eighty_columns(command: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*HPC_GYM, *command.split(), "--help"],
        **{"capture_output": True, "text": True, "env": {**environment, "COLUMNS": "80"}},
    )
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("text", ['{"version": 2}', '{"version": 1, "of_tomorrow": 3}', "[]", "{"])
@pytest.mark.parametrize("arguments", ["status past", "logs past --role train", "logs past --node 0", "resume past"])
def test_a_plan_of_another_version_is_a_sentence(
    arguments: str, text: str, environment: dict[str, str], run_dir: Path
) -> None:
    (run_dir / "plan.json").write_text(text)
    told = hpc_gym(environment, *arguments.split())
    assert (told.returncode, told.stdout, len(told.stderr.splitlines())) == (2, "", 1)
    assert "is no whole run directory any more: plan.json: not a plan of this hpc-gym" in told.stderr


def test_the_root_help_gives_a_job_to_the_commands_that_want_one(environment: dict[str, str]) -> None:
    told = hpc_gym(environment, "--help").stdout
    assert "hpc-gym cancel JOB | resume JOB " in told
    assert hpc_gym(environment, "cancel").returncode == hpc_gym(environment, "resume").returncode == 2


def test_of_a_chain_every_job_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = JobRecord("7", "slurm", "long", str(tmp_path), "demo", "x", 3, 0.0, chain=("8", "9"))
    _say(HpcgymJob.of(chain), follow=False)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == "Submitted job 7 (3 nodes, slurm)."
    assert "7, 8, 9. `hpc-gym cancel long` stops all." in second
    _say(HpcgymJob.of(replace(chain, chain=())), follow=False)
    assert "stops all" not in capsys.readouterr().out
