"""Dataset files: read by number, and refused with file and line when NeMo Gym could not run a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gym.data.rows import Rows, check_rows
from hpc_gym.errors import UserError

GOOD = json.dumps({"responses_create_params": {"input": [{"role": "user", "content": "hi"}]}, "answer": "1"})
NAMED = json.dumps({"responses_create_params": {"input": "hi"}, "agent_ref": {"type": "x", "name": "an_agent"}})


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_rows(path)
    return str(caught.value)


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=90), max_size=12), st.booleans()
)
def test_rows_are_the_lines_that_are_not_blank(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(("\n".join(lines) + ("\n" if end else "")).encode())
    rows = Rows(path)
    expected = [
        (number, line.encode())
        for number, line in enumerate(lines, 1)
        if line.encode().strip() or len(line.encode()) >= 64
    ]
    assert [(rows.line(number), rows[number]) for number in range(len(rows))] == expected


def test_a_row_out_of_range_is_an_index_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n")
    rows = Rows(tmp_path / "rows.jsonl")
    for number in (-1, 1):
        with pytest.raises(IndexError):
            rows[number]


def test_a_good_file_is_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{NAMED}\n{NAMED}\n{GOOD}")
    summary = check_rows(path)
    assert (summary.rows, dict(summary.agents), dict(summary.first_line)) == (4, {"an_agent": 2}, {"an_agent": 3})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n\n  \n", "is empty"),
        (GOOD + "\n" + '{"responses_create_params": {"input": ' + "\n", "rows.jsonl:2: not JSON"),
        (GOOD + "\n\n" + '{"a": 1}\n', "rows.jsonl:3: the row lacks 'responses_create_params'"),
        (
            '{"responses_create_params": {"tools": []}}',
            "rows.jsonl:1: the row's 'responses_create_params' lacks 'input'",
        ),
        (
            GOOD + "\n" + '{"responses_create_params": {"input": 5}}',
            "rows.jsonl:2: 'responses_create_params.input' must be a list of messages or text, not 5",
        ),
        (
            '{"responses_create_params": {"input": [ ]}}',
            "rows.jsonl:1: 'responses_create_params.input' is an empty list: a rollout starts with at least one",
        ),
        (
            '{"responses_create_params": {"input": "x"}, "agent_ref": "me"}',
            """rows.jsonl:1: the row's 'agent_ref' must be {"type": "responses_api_agents", "name": AGENT}, or""",
        ),
        ('["a"]\n', "rows.jsonl:1: a row must be a JSON object, not '[\"a\"]'"),
        (
            '{"responses_create_params": 5}',
            "rows.jsonl:1: Expected `object`, got `int` - at `$.responses_create_params`",
        ),
        (GOOD + "\n" + '{"responses_create_params": {"input": "x"}, "agent_ref": {"type": "y"}}', "rows.jsonl:2:"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert says in refused(path)


def test_a_row_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + b'{"responses_create_params": {"input": "caf\xe9"}}\n')
    assert refused(path) == f"{path}:2: not UTF-8: save the file as UTF-8"


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PAR1\x15\x04\n", "a Parquet file"),
        (b"\x1f\x8b\x08\n", "compressed with gzip"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "written with a byte-order mark"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, whose content was not fetched"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(tmp_path: Path, start: bytes, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start)
    assert refused(path) == f"{path} is {kind}: rows are JSON lines in UTF-8, one row per line"


def test_line_seventeen_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD] * 16 + ["{oops"] + [GOOD]))
    assert f"{path}:17: not JSON" in refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.jsonl") == f"there is no file {tmp_path / 'no.jsonl'}"
    assert "cannot be read: Is a directory" in refused(tmp_path)
