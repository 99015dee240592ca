from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_gym.node.log_pump import LogPump, stamped
from hpc_gym.protocol.log_lines import STAMP_LENGTH, log_name, parse_line, parse_log_name, stamp


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"a\nb\n"], b"@a\n@b\n"),
        ([b"a", b"b\nc", b"\n"], b"@ab\n@c\n"),
        ([b"\n\n"], b"@\n@\n"),
        ([b"a\r\nb\n"], b"@a\n@b\n"),
        ([b"\r 10%", b"\r 20%\n"], b"@ 10%\n@ 20%\n"),
        ([b"no end"], b"@no end"),
        ([b"\xff\x00\n"], b"@\xff\x00\n"),
    ],
)
def test_every_line_is_stamped_however_it_arrives(chunks: list[bytes], expected: bytes) -> None:
    out, at_start = b"", True
    for chunk in chunks:
        text, at_start = stamped(chunk, at_start, b"@")
        out += text
    assert out == expected


def test_a_stamp_reads_back_to_the_microsecond() -> None:
    line = stamp(1795180445.534817) + b"hello"
    assert line == b"2026-11-20T13:14:05.534817Z hello"
    assert parse_line(line) == (pytest.approx(1795180445.534817, abs=1e-6), b"hello")
    assert parse_line(b"unstamped") == (0.0, b"unstamped")


@pytest.mark.parametrize(
    ("role", "node", "process"),
    [("train", "train-12", "rank-7"), ("judge", "rollout-0", "judge-0"), ("rollout", "rollout-0", "vllm-0")],
)
def test_the_name_of_a_log_file_reads_back(role: str, node: str, process: str) -> None:
    assert parse_log_name(log_name(role, node, process)) == (role, node, process)


def test_ten_megabytes_a_second_cost_little_and_lose_nothing(tmp_path: Path) -> None:
    lines, log = 400_000, tmp_path / "x.log"
    program = f"import sys\nfor k in range({lines}): sys.stdout.write(f'line {{k:08d}} ' + 'x' * 86 + '\\n')"
    pump = LogPump()
    sink, stream = pump.attach(log)
    before = time.process_time()
    child = subprocess.Popen([sys.executable, "-c", program], stdout=sink)
    os.close(sink)
    assert child.wait(60) == 0
    assert stream.ended.wait(10)
    cpu = time.process_time() - before
    pump.close()
    # 40 MB are four seconds at 10 MB/s: less than a tenth of a core.
    assert cpu < 0.4
    texts = [line[STAMP_LENGTH + 1 :] for line in log.read_bytes().splitlines()]
    assert texts == [b"line %08d %s" % (number, b"x" * 86) for number in range(lines)]


def test_a_child_is_never_held_up_by_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    full = tmp_path / "full.log"
    full.symlink_to("/dev/full")
    pump = LogPump()
    sink, stream = pump.attach(full)
    child = subprocess.Popen([sys.executable, "-c", "print('x' * 5_000_000)"], stdout=sink)
    os.close(sink)
    assert child.wait(20) == 0
    assert stream.ended.wait(5)
    assert stream.lost > 5_000_000
    pump.close()
