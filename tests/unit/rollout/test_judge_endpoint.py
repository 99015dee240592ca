"""The way to the judge on the loopback listener, served for real; what answers behind it is a small HTTP server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hpc_gym.plan.plan import Judge
from hpc_gym.rollout.judge import JudgeEndpoint, peer_uid
from hpc_gym.rollout.policy import PolicyEndpoint
from hpc_gym.rollout.server import RolloutServer, listener

KEY = "sk-planted"
CHAT = b'{"model": "big",  "messages": [{"role": "user", "content": "hi"}]}'
ASK = (
    "import sys, urllib.request, urllib.error\n"
    "try: print(urllib.request.urlopen(sys.argv[1], b'{}', timeout=5).status)\n"
    "except urllib.error.HTTPError as error: print(error.code)"
)


class Outside:
    """A judge: keeps what it was asked, and answers with the status that it is told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, str]] = []
        self.status = 200

    async def answer(self, request: Request) -> Response:
        key = request.headers.get("authorization", "")
        self.seen.append((request.url.path, await request.body(), key))
        return JSONResponse({"said": key if self.status == 401 else "yes"}, self.status)

    def app(self) -> Starlette:
        methods = ["GET", "POST"]
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])


class Served:
    """Applications on ports of their own, on one thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listeners: list[tuple[uvicorn.Server, Any]] = []

    def start(self, app: Any, path: Path | None = None) -> str:
        import socket

        if path is None:
            bound = socket.create_server(("127.0.0.1", 0))
        else:
            bound = socket.socket(socket.AF_UNIX)
            bound.bind(str(path))
            bound.listen()
        started = listener(app)
        future = asyncio.run_coroutine_threadsafe(started.serve([bound]), self._loop)
        self._listeners.append((started, future))
        return "" if path else f"http://127.0.0.1:{bound.getsockname()[1]}"

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def stop(self) -> None:
        for started, future in self._listeners:
            started.should_exit = True
            future.result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.stop()


def endpoint_for(served: Served, judge: Judge, folder: Path) -> tuple[JudgeEndpoint, str]:
    endpoint = JudgeEndpoint(judge, str(folder), {"JUDGE_KEY": KEY})
    server = RolloutServer([], PolicyEndpoint("policy", 100), str(folder), 1, 8, 1, endpoint)
    return endpoint, served.start(server.loopback()) + "/judge/v1"


def ask(url: str, data: bytes | None = CHAT) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as answer:
            return int(answer.status), json.loads(answer.read())
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else body.decode()


def test_a_request_goes_to_the_address_outside_with_its_key_and_nothing_else_changed(
    served: Served, tmp_path: Path
) -> None:
    outside = Outside()
    judge = Judge("big", 5, served.start(outside.app()) + "/v1", "JUDGE_KEY")
    endpoint, url = endpoint_for(served, judge, tmp_path)
    assert ask(f"{url}/chat/completions") == (200, {"said": "yes"})
    assert ask(f"{url}/models", None)[0] == 200
    assert outside.seen == [
        ("/v1/chat/completions", CHAT, f"Bearer {KEY}"),
        ("/v1/models", b"", f"Bearer {KEY}"),
    ]
    assert endpoint.answered == 2
    assert endpoint.up
    assert ask(f"{url}/files")[0] == 404
    served.do(endpoint.close())


@pytest.mark.parametrize("status", [400, 429, 500])
def test_the_judges_own_errors_go_back_as_they_are(served: Served, tmp_path: Path, status: int) -> None:
    outside = Outside()
    outside.status = status
    endpoint, url = endpoint_for(served, Judge("big", 5, served.start(outside.app()) + "/v1"), tmp_path)
    assert ask(f"{url}/chat/completions") == (status, {"said": "yes"})
    assert endpoint.answered == 0
    served.do(endpoint.close())


def test_an_answer_that_quotes_the_key_is_not_passed_on(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = Outside()
    outside.status = 401
    judge = Judge("big", 5, served.start(outside.app()) + "/v1", "JUDGE_KEY")
    endpoint, url = endpoint_for(served, judge, tmp_path)
    status, body = ask(f"{url}/chat/completions")
    assert status == 401
    assert "judge.api_key_env" in body["error"]["message"]
    assert KEY not in json.dumps(body) + caplog.text
    served.do(endpoint.close())


def test_a_judge_of_this_node_is_asked_on_its_socket_and_waited_for(served: Served, tmp_path: Path) -> None:
    endpoint, url = endpoint_for(served, Judge("judge", 5), tmp_path)
    status, body = ask(f"{url}/chat/completions")
    assert status == 503, "NeMo Gym asks again after it"
    assert "may be starting" in body["error"]["message"]
    assert not endpoint.up
    outside = Outside()
    served.start(outside.app(), tmp_path / "judge.sock")
    assert ask(f"{url}/chat/completions")[0] == 200
    assert outside.seen == [("/v1/chat/completions", CHAT, "")]
    served.do(endpoint.close())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_of_the_node_is_refused(served: Served, tmp_path: Path) -> None:
    outside = Outside()
    endpoint, url = endpoint_for(served, Judge("big", 5, served.start(outside.app()) + "/v1"), tmp_path)
    command = ["/usr/bin/env", "python3", "-c", ASK, f"{url}/chat/completions"]
    done = subprocess.run(command, user=65534, capture_output=True, text=True, timeout=20, check=True, env={})
    assert done.stdout.strip() == "403"
    assert outside.seen == []
    assert ask(f"{url}/chat/completions")[0] == 200
    served.do(endpoint.close())


def test_a_key_that_was_not_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"judge.api_key_env: OTHER was not set when the job was submitted"):
        JudgeEndpoint(Judge("big", 5, "https://a.example/v1", "OTHER"), str(tmp_path), {"JUDGE_KEY": KEY})


@pytest.mark.skipif(sys.byteorder != "little", reason="the lines are those of a little-endian machine")
def test_the_owner_of_a_connection_is_that_of_the_clients_end() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 11 1\n"
        "   1: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 12 1\n"
        "   2: 0100007F:C351 0100007F:1F90 06 00000000:00000000 00:00000000 00000000     0        0 0 1\n"
    )
    assert peer_uid(0xC350, 0x1F90, table) == 1000
    assert peer_uid(0xC351, 0x1F90, table) is None
    assert peer_uid(0xC352, 0x1F90, table) is None
