"""The way to the judge on the loopback listener, served for real; what answers behind it is a small HTTP server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving_apps import Served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hpc_gym.plan.plan import Judge
from hpc_gym.protocol.client import RolloutClient, RolloutServerError
from hpc_gym.rollout.environment_server import EnvironmentServer
from hpc_gym.rollout.gym import NemoGym
from hpc_gym.rollout.judge import JudgeEndpoint, peer_uid
from hpc_gym.rollout.policy import PolicyEndpoint
from hpc_gym.rollout.relay import PolicyRelay
from hpc_gym.rollout.server import RolloutServer
from hpc_gym.rollout.serving import guarded

KEY = "sk-planted"
TOKEN = "s3cret"
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
        self.body: bytes | None = None
        self.gate: asyncio.Event | None = None

    @property
    def chats(self) -> list[bytes]:
        return [body for path, body, _ in self.seen if path == "/v1/chat/completions"]

    async def answer(self, request: Request) -> Response:
        key = request.headers.get("authorization", "")
        self.seen.append((request.url.path, await request.body(), key))
        if self.gate is not None and request.url.path != "/health":
            await self.gate.wait()
        if self.body is not None:
            return Response(self.body, self.status)
        return JSONResponse({"said": key if self.status == 401 else "yes", "choices": []}, self.status)

    def app(self) -> Starlette:
        methods = ["GET", "POST"]
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.stop()


def endpoint_for(served: Served, judge: Judge, folder: Path) -> tuple[JudgeEndpoint, str]:
    endpoint = JudgeEndpoint(judge, str(folder), {"JUDGE_KEY": KEY})
    server = RolloutServer([], PolicyEndpoint("policy", 100), str(folder), 1, 8, NemoGym(1), endpoint)
    return endpoint, f"http://{served.start(server.loopback())}/judge/v1"


def ask(url: str, data: bytes | None = CHAT, token: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:
            return int(answer.status), json.loads(answer.read())
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else body.decode()


def test_a_request_goes_to_the_address_outside_with_its_key_and_nothing_else_changed(
    served: Served, tmp_path: Path
) -> None:
    outside = Outside()
    judge = Judge("big", 5, f"http://{served.start(outside.app())}/v1", "JUDGE_KEY")
    endpoint, url = endpoint_for(served, judge, tmp_path)
    assert ask(f"{url}/chat/completions") == (200, {"said": "yes", "choices": []})
    assert ask(f"{url}/models", None)[0] == 200
    assert outside.seen == [
        ("/v1/chat/completions", CHAT, f"Bearer {KEY}"),
        ("/v1/models", b"", f"Bearer {KEY}"),
    ]
    assert endpoint.answered == 2
    assert endpoint.up
    assert ask(f"{url}/files")[0] == 404
    served.do(endpoint.close())


@pytest.mark.parametrize("status", [429, 500])
def test_the_judges_own_errors_go_back_as_they_are(served: Served, tmp_path: Path, status: int) -> None:
    outside = Outside()
    outside.status = status
    endpoint, url = endpoint_for(served, Judge("big", 5, f"http://{served.start(outside.app())}/v1"), tmp_path)
    assert ask(f"{url}/chat/completions") == (status, {"said": "yes", "choices": []})
    assert endpoint.answered == 0
    served.do(endpoint.close())


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, b'{"error": "maximum context length is 64 tokens"}', "refused the question.*maximum context length"),
        (307, b"", "answered chat/completions with 307.*judge.url"),
        (200, b"<html>Welcome to our proxy", "none of an OpenAI-compatible server.*Welcome"),
        (200, b'{"detail": "no such model"}', "none of an OpenAI-compatible server.*no such model"),
    ],
)
def test_what_the_judge_could_not_judge_is_no_verdict(
    served: Served, tmp_path: Path, status: int, body: bytes, words: str
) -> None:
    outside = Outside()
    outside.status, outside.body = status, body
    endpoint, url = endpoint_for(served, Judge("big", 5, f"http://{served.start(outside.app())}/v1"), tmp_path)
    answered, said = ask(f"{url}/chat/completions")
    assert answered == 424, "NeMo Gym neither asks again after it nor takes it for an answer"
    assert re.search(words, said["error"]["message"])
    assert re.search(words, endpoint.trouble)
    outside.status, outside.body = 200, None
    assert ask(f"{url}/chat/completions")[0] == 200
    assert endpoint.trouble == ""
    served.do(endpoint.close())


@pytest.mark.parametrize(
    ("status", "body", "key", "words"),
    [
        (401, b"{}", None, "127.0.0.1 wants a key.*judge.api_key_env"),
        (401, b"{}", "JUDGE_KEY", "127.0.0.1 refused the key in JUDGE_KEY.*judge.api_key_env"),
        (404, b"no model big", None, "404: 'no model big'; judge.url must.*'big' .judge.model_name."),
        (301, b"", None, "answered chat/completions with 301.*judge.url must"),
        (200, b"<html>", None, "none of an OpenAI-compatible server: '<html>'; judge.url must"),
    ],
)
def test_an_address_outside_that_will_never_answer_is_told_before_anything_is_rolled_out(
    served: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
    key: str | None,
    words: str,
) -> None:
    monkeypatch.setattr("hpc_gym.rollout.judge.POLL_OUTSIDE_S", 0.1)
    outside = Outside()
    outside.status, outside.body = status, body
    address = served.start(outside.app())
    endpoint = JudgeEndpoint(Judge("big", 5, f"http://{address}/v1", key), str(tmp_path), {"JUDGE_KEY": KEY})
    server = RolloutServer([], PolicyEndpoint("policy", 100), str(tmp_path), 1, 8, NemoGym(1), endpoint)
    public = served.start(server.public(TOKEN))
    served.watch(endpoint.watch())
    served.until(lambda: bool(re.search(words, endpoint.hopeless)))
    with RolloutClient([public], TOKEN) as client, pytest.raises(RolloutServerError, match=words):
        client.wait_ready(60)
    assert endpoint.status() == endpoint.trouble == endpoint.hopeless

    outside.status, outside.body = 200, None
    served.until(lambda: endpoint.status() == "judge ready")
    assert endpoint.hopeless == endpoint.trouble == ""
    asked = len(outside.seen)
    assert json.loads(outside.seen[-1][1])["model"] == "big"
    time.sleep(0.5)
    assert len(outside.seen) == asked, "it costs somebody money"
    served.do(endpoint.close())


def test_an_address_outside_is_waited_for_as_long_as_a_rollout_would(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_gym.rollout.judge.POLL_OUTSIDE_S", 0.1)
    endpoint, _ = endpoint_for(served, Judge("big", 1, "http://127.0.0.1:9/v1"), tmp_path)
    outside = Outside()
    outside.status = 503
    starting, _ = endpoint_for(served, Judge("big", 30, f"http://{served.start(outside.app())}/v1"), tmp_path)
    served.watch(endpoint.watch())
    served.watch(starting.watch())
    said = "the judge at 127.0.0.1 (judge.url) cannot be asked: it takes no connection"
    served.until(lambda: endpoint.status() == said)
    served.until(lambda: re.fullmatch(re.escape(said) + r", for \d+ s", endpoint.hopeless))
    assert "answered chat/completions with 503" in starting.status()
    assert starting.hopeless == ""
    outside.status = 429
    served.until(lambda: starting.up)
    for each in (endpoint, starting):
        served.do(each.close())


def test_an_answer_that_quotes_the_key_is_not_passed_on(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = Outside()
    outside.status = 401
    judge = Judge("big", 5, f"http://{served.start(outside.app())}/v1", "JUDGE_KEY")
    endpoint, url = endpoint_for(served, judge, tmp_path)
    status, body = ask(f"{url}/chat/completions")
    assert status == 401
    assert body["error"]["message"].endswith("judge.api_key_env must name the right one")
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


class JudgeNode:
    """A judge's vLLM and the judge server before it, on a node of its own."""

    def __init__(self, served: Served, folder: Path) -> None:
        folder.mkdir()
        self.vllm = Outside()
        served.start(self.vllm.app(), folder / "judge.sock")
        self.endpoint = JudgeEndpoint(Judge("judge", 5), str(folder), {})
        self.address = served.start(guarded("a judge server", self.endpoint.public_routes(), TOKEN))
        served.watch(self.endpoint.watch())


def test_judges_on_nodes_of_their_own_share_the_work_and_a_dead_one_is_left_out(served: Served, tmp_path: Path) -> None:
    nodes = [JudgeNode(served, tmp_path / str(number)) for number in range(2)]
    endpoint = JudgeEndpoint(Judge("judge", 5), str(tmp_path), {}, [node.address for node in nodes], TOKEN)
    server = RolloutServer([], PolicyEndpoint("policy", 100), str(tmp_path), 1, 8, NemoGym(1), endpoint)
    url = f"http://{served.start(server.loopback())}/judge/v1/chat/completions"
    assert "judge loading" in server.health().status
    served.watch(endpoint.watch())
    served.until(lambda: endpoint.status() == "judge 2/2 ready")

    gate = asyncio.Event()
    for node in nodes:
        node.vllm.gate = gate
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, url) for _ in range(6)]
        served.until(lambda: all(len(node.vllm.chats) == 3 for node in nodes))
        served.loop.call_soon_threadsafe(gate.set)
        assert [each.result() for each in asked] == [(200, {"said": "yes", "choices": []})] * 6
    assert nodes[0].vllm.chats[0] == CHAT

    served.end(nodes[0].address)
    assert [ask(url)[0] for _ in range(4)] == [200] * 4
    assert (len(nodes[0].vllm.chats), len(nodes[1].vllm.chats)) == (3, 7)
    served.until(lambda: endpoint.status() == "judge 1/2 ready")
    assert endpoint.up
    assert endpoint.answered == 10
    served.do(endpoint.close())


def test_a_judge_node_whose_vllm_is_gone_is_left_out(served: Served, tmp_path: Path) -> None:
    node = JudgeNode(served, tmp_path / "0")
    endpoint = JudgeEndpoint(Judge("judge", 5), str(tmp_path), {}, [node.address], TOKEN)
    served.watch(endpoint.watch())
    served.until(lambda: endpoint.up)
    served.end(str(tmp_path / "0" / "judge.sock"))
    served.until(lambda: not endpoint.up)
    assert endpoint.status() == "judge loading"


def test_a_judge_node_answers_nobody_without_the_token(served: Served, tmp_path: Path) -> None:
    node = JudgeNode(served, tmp_path / "0")
    for path in ("health", "v1/chat/completions"):
        assert ask(f"http://{node.address}/judge/{path}")[0] == 401
    assert node.vllm.chats == []


def test_an_environment_node_asks_the_judge_of_a_rollout_node(served: Served, tmp_path: Path) -> None:
    """With the judge on the rollout nodes, their servers pass requests on to it for whoever has the token."""
    vllm = Outside()
    served.start(vllm.app(), tmp_path / "judge.sock")
    its = JudgeEndpoint(Judge("judge", 5), str(tmp_path), {})
    rollout = RolloutServer([], PolicyEndpoint("policy", 100), str(tmp_path), 1, 8, NemoGym(1), its)
    address = served.start(rollout.public(TOKEN, environment_nodes=True))
    there = JudgeEndpoint(Judge("judge", 5), "", {}, [address], TOKEN)
    environment = EnvironmentServer(NemoGym(1), PolicyRelay([address], TOKEN, "policy", 5), there)
    url = f"http://{served.start(environment.loopback())}/judge/v1/chat/completions"
    assert ask(url) == (200, {"said": "yes", "choices": []})
    assert vllm.chats == [CHAT]
    alone = served.start(rollout.public(TOKEN))
    assert ask(f"http://{alone}/judge/v1/chat/completions", token=TOKEN)[0] == 404, "nobody needs it there"
    served.do(there.close())
    served.do(its.close())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_of_the_node_is_refused(served: Served, tmp_path: Path) -> None:
    outside = Outside()
    endpoint, url = endpoint_for(served, Judge("big", 5, f"http://{served.start(outside.app())}/v1"), tmp_path)
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
