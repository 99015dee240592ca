"""The check of a judge outside, against a small HTTP server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small_project import Project

from hpc_gym.jobs.check import check_experiment
from hpc_gym.jobs.findings import Finding

KEY = "sk-of-the-judge"
JUDGED = "{{url: {url}, model_name: big, api_key_env: JUDGE_KEY}}"


class Answers(BaseHTTPRequestHandler):
    status, body, seen = 200, b"", ""

    def do_GET(self) -> None:
        type(self).seen = f"{self.path} {self.headers.get('Authorization')}"
        self.send_response(self.status)
        if self.status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def finding(project: Project, url: str) -> Finding:
    extends = "environments/math_with_judge_judged"
    (project.folder / "judged.yaml").write_text(
        f"extends: [./small.yaml, {extends}]\nname: judged\njudge: {JUDGED.format(url=url)}\n"
    )
    project.write()
    found = check_experiment(project.folder / "judged.yaml")
    return next(each for each in found if each.check == "judge")


@pytest.mark.parametrize(
    ("status", "body", "wanted", "words"),
    [
        (200, json.dumps({"data": [{"id": "small"}, {"id": "big"}]}), "ok", "big at http"),
        (200, json.dumps({"data": [{"id": "small"}]}), "warning", "does not list 'big'.*it lists: small"),
        (200, "<html>", "warning", "lists no models.*judge.url"),
        (302, "", "warning", "lists no models"),
        (401, "", "failed", "refuses the key.*judge.api_key_env"),
        (403, "", "failed", "refuses the key"),
    ],
)
def test_what_answers_there_is_told(
    project: Project, url: str, monkeypatch: pytest.MonkeyPatch, status: int, body: str, wanted: str, words: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    Answers.status, Answers.body = status, body.encode()
    found = finding(project, url)
    assert found.status == wanted
    assert re.search(words, found.detail)
    assert Answers.seen == f"/v1/models Bearer {KEY}", "and nowhere else"
    assert KEY not in found.detail


def test_an_address_where_nobody_listens_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    found = finding(project, "http://127.0.0.1:9/v1")
    assert found.status == "warning"
    assert "http://127.0.0.1:9/v1 does not answer here" in found.detail
    assert "Connection refused" in found.detail
