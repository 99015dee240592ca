from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from job_plans import plan, service, task

from hpc_gym.cli.live import LinePrinter
from hpc_gym.cli.status_view import attempt_lines, plain, view
from hpc_gym.errors import UserError
from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.jobs.slurm import Standing
from hpc_gym.jobs.stages import Stage
from hpc_gym.jobs.status import Status, StatusReader, read_status
from hpc_gym.plan.plan import DataSource, Probe
from hpc_gym.protocol.attempt import Failure, Outcome

START = 1_790_000_000.0
PROBE = Probe(kind="notify")
HELD_OUT = (DataSource("counter", "/held-out.jsonl", 1.0, 4),)


@pytest.fixture
def record(tmp_path: Path) -> JobRecord:
    rollout = [service("vllm-0", "", ready=PROBE), service("vllm-1", "", ready=PROBE), service("gym", "", ready=PROBE)]
    ranks = [[task("rank-0", "", ready=PROBE)], [task("rank-1", "", ready=PROBE)]]
    wanted = plan(tmp_path, rollout, ranks, max_steps=10, held_out=HELD_OUT)
    (tmp_path / "plan.json").write_text(wanted.to_json())
    gone = ProcessIdentity(os.uname().nodename, "another life", 1, 1)
    return JobRecord("local-1", "local", "run", str(tmp_path), "demo", "local", 3, START, gone)


def event(
    record: JobRecord, second: float, name: str, node: str = "rollout-0", attempt: int = 1, **fields: object
) -> None:
    folder = Path(record.run_dir) / "attempts" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    latest = folder.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(str(attempt))
    process, _, kind = name.rpartition(":")
    line = {"time": START + second, "attempt": attempt, "node": node, "role": "", "process": process, "event": kind}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(line | fields) + "\n")


def append(record: JobRecord, file: str, **fields: object) -> None:
    with (Path(record.run_dir) / file).open("a") as opened:
        opened.write(json.dumps(fields) + "\n")


def step(record: JobRecord, number: int, second: float, **fields: object) -> None:
    told = {"reward": number / 10, "reward/counter": number / 10, "rollouts": 8, "failed": 0, "tokens": 100}
    append(record, "metrics.jsonl", **{"attempt": 1, "step": number, "time": START + second} | told | fields)


def stages(status: Status) -> dict[str, Stage]:
    return {stage.name: stage for stage in status.stages}


def begin(record: JobRecord) -> None:
    for node in ("rollout-0", "train-0", "train-1"):
        event(record, 2, "joined", node)
    for process in ("vllm-0", "vllm-1", "gym"):
        event(record, 2.5, f"{process}:started", restarts=0)
    for node in ("train-0", "train-1"):
        event(record, 2.5, f"rank-{node[-1]}:started", node, restarts=0)


def ready(record: JobRecord) -> None:
    for process, second in (("vllm-0", 30), ("vllm-1", 32), ("gym", 20)):
        event(record, second, f"{process}:ready")
    for node in ("train-0", "train-1"):
        event(record, 33, f"rank-{node[-1]}:ready", node)


def test_before_the_first_attempt_the_job_is_queued(record: JobRecord) -> None:
    told = stages(read_status(record, Standing("RUNNING")))
    assert (told["queued"].state, told["nodes"].state, told["nodes"].detail) == ("running", "waiting", "0/3")
    assert list(told) == [
        *("queued", "nodes", "vLLM", "NeMo Gym", "trainers"),
        *("evaluation before", "training", "evaluation after", "export"),
    ]


def test_services_tell_how_many_are_ready_and_what_they_say(record: JobRecord) -> None:
    begin(record)
    event(record, 30, "vllm-0:ready")
    event(record, 12, "gym:progress", text="3 / 9 servers")
    told = stages(read_status(record, Standing("RUNNING")))
    assert (told["queued"].state, told["queued"].seconds) == ("done", 2.0)
    assert (told["nodes"].state, told["nodes"].detail) == ("done", "3/3")
    assert (told["vLLM"].state, told["vLLM"].detail) == ("running", "1/2 ready")
    assert (told["NeMo Gym"].state, told["NeMo Gym"].detail) == ("running", "0/1 ready, 3/9 servers")


def test_training_tells_its_pace_and_what_is_left(record: JobRecord) -> None:
    begin(record)
    ready(record)
    append(
        record,
        "evaluations.jsonl",
        attempt=1,
        step=0,
        when="before",
        time=START + 40,
        rewards={"counter": [0.0, None, 1.0]},
    )
    for number in range(1, 5):
        step(record, number, 40 + 5 * number, rollout_seconds=3.0, failed=number % 2)
    event(record, 61, "rank-0:status", "train-0", text="step 5/10: rollouts 3/4")
    event(record, 61, "rank-1:status", "train-1", text="step 5/10: rollouts 1/4")
    status = read_status(record, Standing("RUNNING"))
    told = stages(status)
    assert (told["vLLM"].state, told["vLLM"].seconds) == ("done", 29.5)
    assert (told["evaluation before"].state, told["evaluation before"].seconds) == ("done", 7.0)
    assert told["evaluation before"].detail == "counter 0.500"
    assert (told["training"].state, told["training"].detail) == ("running", "step 4/10, step 5/10: rollouts 4/8")
    assert (status.step, status.reward, status.rewards) == (4, 0.4, {"counter": 0.4})
    assert status.time_left_s == 30.0
    assert status.tokens_per_s == 20.0
    assert status.failed_share == pytest.approx(1 / 24)
    assert status.waiting_share == pytest.approx(0.6)


def test_a_finished_job_has_all_stages_done_and_a_fixed_duration(record: JobRecord, tmp_path: Path) -> None:
    begin(record)
    ready(record)
    append(record, "evaluations.jsonl", attempt=1, step=0, when="before", time=START + 40, rewards={"counter": [0.0]})
    step(record, 10, 90)
    append(record, "evaluations.jsonl", attempt=1, step=10, when="after", time=START + 100, rewards={"counter": [1.0]})
    (tmp_path / "model").mkdir()
    for node in ("train-0", "train-1"):
        event(record, 105, f"rank-{node[-1]}:exited", node, exit_code=0, signal=None)
    event(record, 106, "outcome", kind="completed")
    Outcome("completed").write(tmp_path, tmp_path / "attempts" / "1")
    status = read_status(record, Standing("COMPLETED"))
    assert {stage.state for stage in status.stages} == {"done"}
    assert stages(status)["export"].seconds == 5.0
    assert (status.seconds, status.outcome, status.time_left_s) == (106.0, "COMPLETED", None)
    assert status.evaluations == {"before": {"counter": 0.0}, "after": {"counter": 1.0}}


def test_a_failed_job_says_the_first_cause_and_where_it_stood(record: JobRecord, tmp_path: Path) -> None:
    begin(record)
    event(record, 9, "vllm-0:restarting", restarts=1, cause="exit code 1: no memory")
    failure = Failure("rollout", "rollout-0", "vllm-0", "no memory", "/a.log", 1, START + 20, exit_code=1)
    Outcome("failed", failure=failure).write(tmp_path, tmp_path / "attempts" / "1")
    status = read_status(record, Standing("FAILED"))
    assert stages(status)["vLLM"].state == "failed"
    assert stages(status)["training"].state == "waiting"
    assert status.outcome == f"FAILED: {failure.sentence()}"
    assert status.notes == ("vllm-0 on rollout-0 is started again: exit code 1: no memory",)


def test_reader_reads_on_leaves_torn_lines_and_turns_to_the_next_attempt(record: JobRecord, tmp_path: Path) -> None:
    reader = StatusReader(record)
    begin(record)
    assert reader.read(Standing("RUNNING")).attempt == 1
    step(record, 1, 50)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 2, "ti')
    assert reader.read(Standing("RUNNING")).step == 1
    with (tmp_path / "metrics.jsonl").open("a") as file:
        # The attempt was killed in the middle of the line; the next one begins on a fresh line.
        file.write("\n")
    event(record, 100, "joined", "rollout-0", attempt=2)
    step(record, 3, 150, attempt=2)
    status = reader.read(Standing("RUNNING"))
    assert (status.attempt, status.step) == (2, 3)
    assert stages(status)["nodes"].detail == "1/3"


def test_lines_are_printed_once_per_change(record: JobRecord) -> None:
    reader, printer = StatusReader(record), LinePrinter()
    begin(record)
    first = printer.new_lines(reader.read(Standing("RUNNING")))
    assert any("nodes: done" in line and "3/3" in line for line in first)
    assert printer.new_lines(reader.read(Standing("RUNNING"))) == []
    ready(record)
    lines = printer.new_lines(reader.read(Standing("RUNNING")))
    assert any("vLLM: done in 29.5 s, 2/2 ready" in line for line in lines)


def test_view_shows_stages_and_training(record: JobRecord) -> None:
    from rich.console import Console

    begin(record)
    ready(record)
    step(record, 1, 50)
    step(record, 2, 55)
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(view(read_status(record, Standing("RUNNING"))))
    text = console.export_text()
    for told in ("vLLM", "2/2 ready", "counter  0.200  ▁█  0.10 to 0.20", "20 tokens/s", "40.0 s left"):
        assert told in text


def test_while_it_waits_the_queue_says_why_also_between_two_attempts(record: JobRecord, tmp_path: Path) -> None:
    waits = Standing("PENDING", "Resources (for nodes to become free), expected start 2026-11-21 08:00:00")
    slurm = replace(record, kind="slurm", submitted=time.time() - 60)
    told = stages(read_status(slurm, waits))
    assert (told["queued"].state, told["queued"].detail) == ("running", waits.waiting)
    assert told["queued"].seconds == pytest.approx(60, abs=5)
    begin(record)
    ready(record)
    step(record, 1, 50)
    event(record, 60, "outcome", kind="requeue")
    Outcome("requeue", "preempted").write(tmp_path, tmp_path / "attempts" / "1")
    told = stages(read_status(slurm, Standing("PENDING", "BeginTime")))
    assert (told["queued"].detail, told["queued"].began) == ("again: BeginTime", START + 60)
    assert {told[name].state for name in ("nodes", "checks", "vLLM", "training")} == {"waiting"}
    assert told["training"].detail == "step 1/10"
    cancelled = read_status(slurm, Standing("CANCELLED")).outcome
    assert cancelled == "CANCELLED, though it was to be requeued: preempted"
    event(record, 70, "began", "", attempt=2)
    step(record, 2, 80, attempt=2)
    (line,) = attempt_lines(read_status(slurm, Standing("PENDING", "BeginTime")))
    assert line.endswith("preempted; attempt 2 began 10.0 s later, from step 1")


def test_a_job_that_is_cancelled_in_the_queue_says_that_it_never_began(record: JobRecord) -> None:
    status = read_status(replace(record, kind="slurm"), Standing("CANCELLED"))
    assert status.outcome == "CANCELLED: the job ended before its script began"


def test_nodes_tell_when_they_were_allocated_where_they_are_and_whether_they_are_fit(record: JobRecord) -> None:
    slurm = replace(record, kind="slurm")
    event(record, 5, "began", "")
    told = stages(read_status(slurm, Standing("RUNNING")))
    assert (told["queued"].state, told["queued"].seconds) == ("done", 5.0)
    assert (told["nodes"].state, told["nodes"].began) == ("running", START + 5)
    for number, node in enumerate(("rollout-0", "train-0", "train-1")):
        event(record, 7 + number, "joined", node, host=f"gpu{number}")
    event(record, 9, "checked", "rollout-0")
    status = read_status(slurm, Standing("RUNNING"))
    told = stages(status)
    assert (told["nodes"].detail, told["nodes"].seconds) == ("3/3: gpu0, gpu1, gpu2", 4.0)
    assert (told["checks"].state, told["checks"].detail) == ("running", "1/3 nodes are fit")
    assert status.hosts == {"rollout-0": "gpu0", "train-0": "gpu1", "train-1": "gpu2"}
    event(record, 10, "checked", "train-0")
    event(record, 11, "checked", "train-1")
    told = stages(read_status(slurm, Standing("RUNNING")))
    assert (told["checks"].state, told["checks"].seconds) == ("done", 4.0)
    assert "checks" not in stages(read_status(record, Standing("RUNNING")))


def test_a_stage_tells_only_what_the_ranks_say_of_it(record: JobRecord) -> None:
    begin(record)
    ready(record)
    for node in ("train-0", "train-1"):
        event(record, 34, f"rank-{node[-1]}:status", node, text="training")
    told = stages(read_status(record, Standing("RUNNING")))
    assert (told["evaluation before"].state, told["evaluation before"].detail) == ("running", "")
    for node, done in (("train-0", 30), ("train-1", 12)):
        text = f"evaluation before, step 0: rollouts {done}/100"
        event(record, 35, f"rank-{node[-1]}:status", node, text=text)
    told = stages(read_status(record, Standing("RUNNING")))
    assert told["evaluation before"].detail == "rollouts 42/200"
    append(record, "evaluations.jsonl", attempt=1, step=0, when="before", time=START + 40, rewards={"counter": [1.0]})
    told = stages(read_status(record, Standing("RUNNING")))
    assert (told["training"].state, told["training"].detail) == ("running", "step 0/10")
    event(record, 50, "rank-0:saving", "train-0")
    told = stages(read_status(record, Standing("RUNNING")))
    assert told["training"].detail == "step 0/10, saving a checkpoint"


def test_servers_are_counted_over_all_nodes_and_stay_counted_when_ready(record: JobRecord) -> None:
    begin(record)
    event(record, 10, "gym:progress", text="3 / 9 servers, waiting for verifier")
    told = stages(read_status(record, Standing("RUNNING")))
    assert told["NeMo Gym"].detail == "0/1 ready, 3/9 servers, waiting for verifier"
    event(record, 12, "gym:ready")
    event(record, 12, "vllm-0:progress", text="nothing listens on its socket")
    told = stages(read_status(record, Standing("RUNNING")))
    assert told["NeMo Gym"].detail == "1/1 ready, 9/9 servers"
    assert told["vLLM"].detail == "0/2 ready, loading"


def test_the_morning_after_one_line_says_why_the_job_came_back(record: JobRecord, tmp_path: Path) -> None:
    begin(record)
    ready(record)
    for number in (1, 2, 3):
        step(record, number, 40 + number)
    event(record, 60, "silent", "train-1", cause="no heartbeat for 10 s")
    event(record, 65, "outcome", kind="requeue")
    lost = Failure("train", "train-1", "supervisor", "host gpu7: no heartbeat for 10 s", "/r/events.jsonl", 1, START)
    ended = Outcome("requeue", "a node was lost", ("gpu7",), lost)
    ended.write(tmp_path, tmp_path / "attempts" / "1")
    event(record, 185, "began", "", attempt=2)
    event(record, 186, "joined", "rollout-0", attempt=2)
    step(record, 3, 250, attempt=2)
    status = read_status(record, Standing("RUNNING"))
    (earlier,) = status.earlier_attempts
    assert (earlier.kind, earlier.ended, status.resumed_from) == ("requeue", START + 65, 2)
    (line,) = attempt_lines(status)
    assert "attempt 1 ended at" in line
    assert "host gpu7: no heartbeat for 10 s; without gpu7; attempt 2 began 2 min 00 s later, from step 2" in line
    assert line in plain(status)
    assert json.loads(json.dumps(asdict(status)))["earlier_attempts"][0]["sentence"] == ended.sentence()


def test_a_run_that_was_complete_and_is_resumed_tells_its_story_also_while_it_waits(
    record: JobRecord, tmp_path: Path
) -> None:
    event(record, 1, "began", "", job_id="41")
    begin(record)
    ready(record)
    for number in range(1, 9):
        step(record, number, 40 + number, max_steps=8)
    append(record, "evaluations.jsonl", attempt=1, step=8, when="after", time=START + 60, rewards={"counter": [1.0]})
    (tmp_path / "model").mkdir()
    for node in ("train-0", "train-1"):
        event(record, 65, f"rank-{node[-1]}:exited", node, exit_code=0, signal=None)
    Outcome("completed").write(tmp_path, tmp_path / "attempts" / "1")
    (tmp_path / "attempts" / "latest").unlink()
    again = replace(record, kind="slurm", job_id="99", submitted=START + 5000)
    status = read_status(again, Standing("PENDING", "Resources"))
    (line,) = attempt_lines(status)
    assert line.endswith("after 1 min 04 s: COMPLETED")
    told = stages(status)
    assert (told["queued"].began, told["queued"].detail) == (START + 5000, "Resources")
    event(record, 5100, "began", "", attempt=2, job_id="99")
    event(record, 5101, "joined", "rollout-0", attempt=2, host="node1")
    status = read_status(again, Standing("RUNNING"))
    told = stages(status)
    assert told["queued"].seconds == 100.0
    assert {told[name].state for name in ("training", "evaluation after", "export")} == {"waiting"}
    step(record, 9, 5200, attempt=2)
    (line,) = attempt_lines(read_status(again, Standing("RUNNING")))
    assert line.endswith("COMPLETED; attempt 2 began 1 h 23 min later as job 99, from step 8")


def test_an_attempt_that_could_not_say_how_it_ended_is_told_of(record: JobRecord) -> None:
    begin(record)
    event(record, 200, "began", "", attempt=2)
    (earlier,) = read_status(record, Standing("RUNNING")).earlier_attempts
    assert (earlier.kind, earlier.ended) == ("unknown", START + 2.5)


def test_a_checkpoint_counts_once_it_is_whole_and_has_an_age(record: JobRecord, tmp_path: Path) -> None:
    for number in (5, 10):
        (tmp_path / "checkpoints" / f"checkpoint-{number}").mkdir(parents=True)
    whole = tmp_path / "checkpoints" / "checkpoint-5" / "complete.json"
    whole.write_text("{}")
    os.utime(whole, (time.time() - 300,) * 2)
    begin(record)
    step(record, 10, 50)
    status = read_status(record, Standing("RUNNING"))
    assert (status.checkpoint, round(status.checkpoint_age_s or 0, -1)) == (5, 300)
    assert "checkpoint 5 5 min 0" in plain(status)


def test_curves_keep_what_came_later_of_a_step_that_came_twice(record: JobRecord) -> None:
    for number in range(1, 201):
        step(record, number, number, **{"reward/counter": 0.0})
    for number in range(101, 301):
        step(record, number, 300 + number, attempt=2, **{"reward/counter": 1.0})
    curve = read_status(record, Standing("RUNNING")).curves["counter"]
    assert len(curve) == 60
    assert (curve[:20], curve[20:]) == ((0.0,) * 20, (1.0,) * 40)


def test_a_plain_status_has_no_signs_of_a_terminal_and_a_narrow_one_fits(record: JobRecord) -> None:
    from rich.console import Console

    begin(record)
    ready(record)
    for number in range(1, 9):
        step(record, number, 40 + number)
    status = read_status(record, Standing("RUNNING"))
    text = plain(status)
    assert text.isascii()
    assert "reward counter 0.800" in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    for width in (30, 60):
        with Path(os.devnull).open("w") as nowhere:
            console = Console(width=width, record=True, file=nowhere)
            console.print(view(status, width=width))
        assert all(len(line) <= width for line in console.export_text().splitlines())


def test_a_run_without_its_plan_is_refused_with_a_sentence(record: JobRecord, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="no whole run directory any more"):
        read_status(record, Standing("RUNNING"))
    (tmp_path / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: No such file"):
        read_status(record, Standing("RUNNING"))


def test_a_day_of_statuses_is_read_in_a_moment(record: JobRecord) -> None:
    begin(record)
    ready(record)
    with (Path(record.run_dir) / "attempts" / "1" / "events.jsonl").open("a") as file:
        for number in range(100_000):
            told = {"time": START + 40 + number, "attempt": 1, "node": f"train-{number % 2}", "role": "train"}
            told |= {"process": f"rank-{number % 2}", "event": "status", "text": f"step 1/10: rollouts {number}/100000"}
            file.write(json.dumps(told) + "\n")
    began = time.process_time()
    told = stages(read_status(record, Standing("RUNNING")))
    assert time.process_time() - began < 1.0
    assert told["evaluation before"].seconds is not None


def test_reading_on_costs_nothing_after_many_steps(record: JobRecord) -> None:
    begin(record)
    ready(record)
    for number in range(1, 5001):
        step(record, number, 50 + number)
    reader = StatusReader(record)
    reader.read(Standing("RUNNING"))
    began = time.perf_counter()
    for _ in range(20):
        reader.read(Standing("RUNNING"))
    assert (time.perf_counter() - began) / 20 < 0.02
