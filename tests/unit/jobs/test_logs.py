from __future__ import annotations

import json
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gym.jobs import log_merge
from hpc_gym.jobs.log_errors import LogLine
from hpc_gym.jobs.log_files import LogFile, Selection, log_files
from hpc_gym.jobs.logs import errors, logs
from hpc_gym.protocol.attempt import Failure, Outcome
from hpc_gym.protocol.log_lines import log_name, parse_line, stamp

START = 1_790_000_000.0


def write_log(run_dir: Path, attempt: int, role: str, node: str, process: str, lines: list[tuple[float, str]]) -> Path:
    folder = run_dir / "attempts" / str(attempt) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / log_name(role, node, process)
    with path.open("ab") as file:
        file.writelines(stamp(START + second) + text.encode() + b"\n" for second, text in lines)
    return path


def end_attempt(run_dir: Path, attempt: int, outcome: Outcome) -> None:
    folder = run_dir / "attempts" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    outcome.write(run_dir, folder)
    latest = run_dir / "attempts" / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(str(attempt))


def shown(pieces: object) -> list[str]:
    return b"".join(pieces).decode().splitlines()  # type: ignore[arg-type]


# Few moments, so that many lines of several files fall together; None is a line without a stamp.
MOMENTS = st.one_of(st.none(), st.integers(0, 12))
FILES = st.lists(st.lists(MOMENTS, max_size=40), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(files=FILES, chunk=st.sampled_from([1, 7, 64, 1 << 17]), torn=st.booleans())
def test_merge_keeps_every_line_in_time_order_whatever_the_chunk(
    files: list[list[int | None]], chunk: int, torn: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_merge, "_CHUNK", chunk)
        logs_of, wanted = [], []
        for number, moments in enumerate(files):
            path = Path(folder) / f"{number}.log"
            lines, latest = [], -1
            for index, moment in enumerate(moments):
                text = f"file {number} line {index}".encode()
                lines.append(text if moment is None else stamp(START + moment) + text)
                # A clock that steps back, or a line without a stamp, never moves a line before its predecessor.
                latest = latest if moment is None else max(latest, moment)
                wanted.append((latest, number, index, lines[-1]))
            end = b"" if torn or not lines else b"\n"
            path.write_bytes(b"\n".join(lines) + end)
            logs_of.append(LogFile(str(path), 1, "train", "train-0", f"rank-{number}"))
        merged = [each for lines in log_merge.merge(logs_of) for each in lines]
    key = {(f"rank-{number}", line): (latest, number, index) for latest, number, index, line in wanted}
    assert len(merged) == len(wanted)
    places = [key[file.process, line] for file, line in merged]
    assert [place[0] for place in places] == sorted(place[0] for place in places)
    for number in range(len(files)):
        of_file = [index for _, each, index in places if each == number]
        assert of_file == sorted(of_file)


def test_lines_say_role_node_and_process_and_the_end_says_how_the_job_ended(tmp_path: Path) -> None:
    write_log(tmp_path, 1, "rollout", "rollout-0", "vllm-0", [(0, "loading"), (2, "ready")])
    write_log(tmp_path, 1, "train", "train-1", "rank-1", [(1, "waiting"), (3, "step 1")])
    write_log(tmp_path, 2, "train", "train-1", "rank-1", [(9, "resumed")])
    end_attempt(tmp_path, 2, Outcome("completed"))
    lines = shown(logs(tmp_path))
    assert [line.split()[:3] for line in lines[:4]] == [
        ["rollout", "rollout-0", "vllm-0"],
        ["train", "train-1", "rank-1"],
        ["rollout", "rollout-0", "vllm-0"],
        ["train", "train-1", "rank-1"],
    ]
    assert [line.split()[-1] for line in lines[:4]] == ["loading", "waiting", "ready", "1"]
    assert lines[4:] == ["-- attempt 2 --", lines[5], "COMPLETED"]
    assert lines[5].endswith("resumed")


def test_lines_of_any_length_with_and_without_a_stamp_come_out_whole(tmp_path: Path) -> None:
    path = write_log(tmp_path, 1, "train", "train-0", "rank-0", [(0, "x" * 1000), (2, ""), (4, "last")])
    path.write_bytes(path.read_bytes().replace(stamp(START + 4), b""))
    write_log(tmp_path, 1, "train", "train-1", "rank-1", [(1, "y" * 63), (3, "z" * 300_000)])
    lines = shown(logs(tmp_path))
    assert [line.removeprefix("train train-") for line in lines] == [
        f"0 rank-0 {time_of(0)} {'x' * 1000}",
        f"1 rank-1 {time_of(1)} {'y' * 63}",
        f"0 rank-0 {time_of(2)} ",
        "0 rank-0 last",
        f"1 rank-1 {time_of(3)} {'z' * 300_000}",
    ]


def time_of(second: float) -> str:
    """The time as it is shown: to milliseconds."""
    return stamp(START + second)[:23].decode()


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(role="train"), ["train-0 rank-0", "train-1 rank-1"]),
        (Selection(node="rollout-0"), ["rollout-0 gym", "rollout-0 vllm-0"]),
        (Selection(node="1"), ["train-1 rank-1"]),
        (Selection(process="gym"), ["rollout-0 gym"]),
        (Selection(attempt=2), []),
    ],
)
def test_selection(tmp_path: Path, selection: Selection, expected: list[str]) -> None:
    for role, node, process in [
        ("rollout", "rollout-0", "gym"),
        ("rollout", "rollout-0", "vllm-0"),
        ("train", "train-0", "rank-0"),
        ("train", "train-1", "rank-1"),
    ]:
        write_log(tmp_path, 1, role, node, process, [(0, "x")])
    assert [f"{file.node} {file.process}" for file in log_files(tmp_path, selection)] == expected


def test_follow_shows_new_lines_files_and_attempts_within_a_second_and_ends_with_the_job(tmp_path: Path) -> None:
    write_log(tmp_path, 1, "train", "train-0", "rank-0", [(0, "old")])
    over = threading.Event()
    seen: dict[str, float] = {}
    order: list[str] = []

    def read() -> None:
        for piece in logs(tmp_path, ended=over.is_set):
            for line in piece.decode().splitlines():
                seen[line.rpartition(" ")[2]] = time.monotonic()
                order.append(line.rpartition(" ")[2])

    reader = threading.Thread(target=read)
    reader.start()
    written: dict[str, float] = {}
    for second, (attempt, process, text) in enumerate(
        [(1, "rank-0", "grown"), (1, "rank-1", "newfile"), (2, "rank-0", "newattempt"), (2, "rank-0", "last")], start=1
    ):
        time.sleep(0.3)
        write_log(tmp_path, attempt, "train", "train-0", process, [(second, text)])
        written[text] = time.monotonic()
    time.sleep(0.9)
    end_attempt(tmp_path, 2, Outcome("cancelled", "asked to"))
    over.set()
    reader.join(5)
    assert not reader.is_alive()
    assert [text for text in order if text in written] == list(written)
    assert {text: seen[text] - moment < 1.0 for text, moment in written.items()} == dict.fromkeys(written, True)
    assert order[-1] == "to"


def test_follow_gives_out_a_torn_last_line_when_the_job_has_ended(tmp_path: Path) -> None:
    path = write_log(tmp_path, 1, "train", "train-0", "rank-0", [(0, "whole")])
    with path.open("ab") as file:
        file.write(stamp(START + 1) + b"torn")
    lines = shown(logs(tmp_path, ended=lambda: True))
    assert [line.split()[-1] for line in lines] == ["whole", "torn"]


TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in <module>',
    "    g()",
    "ValueError: no such row",
]


def test_errors_show_the_first_cause_first_with_context_and_end_with_the_failure(tmp_path: Path) -> None:
    early = [(0.0, "starting"), (1.0, "ERROR: lost the trainer"), (1.1, "shutting down")]
    write_log(tmp_path, 1, "rollout", "rollout-0", "rollout-server", early)
    told = ["a", "b", "reading rows", *TRACEBACK, "after"]
    path = write_log(tmp_path, 1, "train", "train-1", "rank-1", [(2 + i / 10, text) for i, text in enumerate(told)])
    failure = Failure("train", "train-1", "rank-1", "ValueError: no such row", str(path), 1, START, exit_code=1)
    end_attempt(tmp_path, 1, Outcome("failed", failure=failure))
    lines = shown(errors(tmp_path))
    texts = [line.split(maxsplit=4)[4] if line.startswith(("train ", "rollout ")) else line for line in lines]
    heading, *first = texts[: texts.index("== attempt 1, others ==")]
    assert heading == "== attempt 1, first cause =="
    assert [text.strip() for text in first if text] == [text.strip() for text in told]
    assert any("lost the trainer" in text for text in texts)
    assert lines[-1] == f"FAILED: {failure.sentence()}"


def test_where_the_first_cause_left_no_word_its_sentence_stands_first(tmp_path: Path) -> None:
    write_log(tmp_path, 1, "train", "train-0", "rank-0", [(1.0, "ERROR: connection closed by peer")])
    write_log(tmp_path, 1, "train", "train-1", "rank-1", [(0.5, "step 3")])
    lost = Failure("train", "train-1", "supervisor", "host gpu7: no heartbeat for 10 s", "events.jsonl", 1, START)
    end_attempt(tmp_path, 1, Outcome("requeue", "a node was lost", ("gpu7",), lost))
    first, _, others, error, *_ = shown(errors(tmp_path))
    assert first == f"== attempt 1, first cause: {lost.sentence()} =="
    assert others == "== attempt 1, others =="
    assert error.endswith("connection closed by peer")


def test_between_attempts_stands_how_the_one_ended(tmp_path: Path) -> None:
    write_log(tmp_path, 1, "train", "train-0", "rank-0", [(1.0, "one")])
    end_attempt(tmp_path, 1, Outcome("requeue", "preempted"))
    write_log(tmp_path, 2, "train", "train-0", "rank-0", [(2.0, "two")])
    end_attempt(tmp_path, 2, Outcome("completed"))
    _, *between, _, last = shown(logs(tmp_path))
    assert between == ["-- attempt 1 ended: TO BE REQUEUED: preempted --", "-- attempt 2 --"]
    assert last == "COMPLETED"


def test_names_of_different_length_stand_one_below_the_other(tmp_path: Path) -> None:
    write_log(tmp_path, 1, "train", "train-0", "rank-0", [(1.0, "one")])
    write_log(tmp_path, 1, "rollout", "rollout-0", "rollout-server", [(2.0, "two")])
    assert len({line.index("2026-") for line in shown(logs(tmp_path))}) == 1


def test_errors_of_workers_and_chained_tracebacks_stay_in_one_block(tmp_path: Path) -> None:
    chained = [*TRACEBACK, "", "During handling of the above exception, another exception occurred:", "", *TRACEBACK]
    told = [f"(EngineCore pid=71) ERROR 11-20 12:50:11 [core.py:10] {text}" for text in chained]
    write_log(tmp_path, 1, "rollout", "rollout-0", "vllm-0", [(i / 10, text) for i, text in enumerate(told)])
    blocks = b"".join(errors(tmp_path)).strip().split(b"\n\n")
    assert len(blocks) == 1
    assert blocks[0].count(b"ValueError: no such row") == 2


def test_errors_of_programs_that_share_a_log_are_kept_apart(tmp_path: Path) -> None:
    names = {"policy_model": "no such row", "mcqa_simple_agent": "no answer"}
    mixed = [f"({name}) {text.replace('no such row', why)}" for text in TRACEBACK for name, why in names.items()]
    write_log(tmp_path, 1, "rollout", "rollout-0", "gym", [(i / 10, text) for i, text in enumerate(mixed)])
    first, second = b"".join(errors(tmp_path)).strip().split(b"\n\n")
    assert (first.count(b"(policy_model)"), first.count(b"(mcqa_simple_agent)")) == (4, 0)
    assert (second.count(b"(policy_model)"), second.count(b"(mcqa_simple_agent)")) == (0, 4)


def test_errors_that_come_while_the_attempt_is_stopped_are_only_counted(tmp_path: Path) -> None:
    told = [(1.0, "ERROR: before"), (2.0, "a"), (3.0, "b"), (4.0, "c"), (20.0, "ERROR: connection lost")]
    write_log(tmp_path, 1, "rollout", "rollout-0", "gym", told)
    stopping = {"time": START + 10, "event": "stopping", "process": ""}
    (tmp_path / "attempts" / "1" / "events.jsonl").write_text(json.dumps(stopping) + "\n")
    end_attempt(tmp_path, 1, Outcome("cancelled", "SIGTERM"))
    lines = shown(errors(tmp_path))
    assert any("before" in line for line in lines)
    assert not any("connection lost" in line for line in lines)
    assert lines[-2:] == ["== attempt 1: 1 more came while it was being stopped ==", "CANCELLED: SIGTERM"]


def test_errors_are_shown_once_however_often_they_come(tmp_path: Path) -> None:
    told = [(i / 10, f"ERROR: rollout {i} timed out" if i % 10 == 0 else f"step {i}") for i in range(2000)]
    write_log(tmp_path, 1, "rollout", "rollout-0", "rollout-server", told)
    assert b"".join(errors(tmp_path)).count(b"timed out") == 1


def test_outcome_reads_what_it_writes(tmp_path: Path) -> None:
    failure = Failure("train", "train-0", "rank-0", "x", "y", 1, 2.0, signal="SIGKILL")
    end_attempt(tmp_path, 1, Outcome("failed", failure=failure))
    assert json.loads((tmp_path / "failure.json").read_text()) == asdict(failure)
    assert parse_line(stamp(START) + b"text") == (START, b"text")


@pytest.mark.parametrize(
    "text",
    [
        *("ERROR", "CRITICAL x", "FATAL", "Fatal Python error: Aborted", "panic: x", "Segmentation fault", "Bus error"),
        *("Killed", "Out of memory", "out of memory", "CUDA error: x", "NCCL error in", "No space left on device"),
        *("Unable to allocate 3 GiB", "ValueError: x", "torch.OutOfMemoryError: x", "a.b.MyException: x"),
    ],
)
def test_what_counts_as_an_error(text: str) -> None:
    assert LogLine.of(stamp(START) + text.encode()).is_error
    assert not LogLine.of(stamp(START) + b"step 7 reward 0.5").is_error
