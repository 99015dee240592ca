"""Environment nodes and the way to them and back, served for real. What stands for NeMo Gym is a small server that
behaves as its head and agents do: it asks the policy for turns at the address that it was given, then answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import urllib.error
import urllib.request
from collections.abc import Coroutine, Iterator
from typing import Any

import aiohttp
import pytest
from serving_apps import Served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hpc_gym.plan.plan import Judge
from hpc_gym.rollout.environment_nodes import EnvironmentNodes
from hpc_gym.rollout.environment_server import EnvironmentServer
from hpc_gym.rollout.gym import NemoGym
from hpc_gym.rollout.judge import JudgeEndpoint
from hpc_gym.rollout.outcomes import Failed, read_verdict, worth_retrying
from hpc_gym.rollout.policy import TAG
from hpc_gym.rollout.relay import PolicyRelay
from hpc_gym.rollout.serving import RequireToken

TOKEN = "s3cret"


class Gym:
    """Head server and one agent in one application."""

    def __init__(self, served: Served) -> None:
        self.policy = ""
        self.endpoint = served.start(Starlette(routes=[
            Route("/server_instances", self._instances, methods=["GET"]),
            Route("/", lambda _: Response(), methods=["GET"]),
            Route("/run", self._run, methods=["POST"]),
        ]))  # fmt: skip
        self.runs: list[dict[str, Any]] = []

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    async def _instances(self, _: Request) -> Response:
        return JSONResponse([{"process_name": "agent", "url": f"http://{self.endpoint}"}])

    async def _run(self, request: Request) -> Response:
        row = await request.json()
        self.runs.append(row)
        if row.get("status"):
            return Response("no such tool", int(row["status"]))
        chat = {"messages": [{"role": "user", "content": "hi"}], TAG: row["tag"]}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{self.policy}/v1/chat/completions", json=chat) as answer,
        ):
            return JSONResponse({"reward": 1.0, "status": answer.status, "said": await answer.text()})


class Policy:
    """A rollout server's policy endpoint: says which it is, or never answers a rollout that is to hang."""

    def __init__(self, served: Served, name: str) -> None:
        self.name = name
        self.seen: list[dict[str, Any]] = []
        self.dropped = 0
        app = Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])])
        self.endpoint = served.start(RequireToken(app, TOKEN))

    async def _chat(self, request: Request) -> Response:
        chat = await request.json()
        self.seen.append(chat)
        if "hang" in chat[TAG]:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.dropped += 1
        return Response(self.name, 410 if "ended" in chat[TAG] else 200)


class Node:
    """An environment node: NeMo Gym and the environment server."""

    def __init__(self, served: Served, policies: list[str]) -> None:
        self.served = served
        self.gym = Gym(served)
        relay = PolicyRelay(policies, TOKEN, "policy", 20)
        self.server = EnvironmentServer(NemoGym(self.gym.port), relay)
        self.endpoint = served.start(self.server.public(TOKEN))
        self.gym.policy = served.start(self.server.loopback())
        served.watch(self.server.watch())

    def end(self) -> None:
        """The environment server is gone."""
        self.served.end(self.endpoint)


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.stop()


@pytest.fixture
def policies(served: Served) -> list[Policy]:
    return [Policy(served, "first"), Policy(served, "second")]


@pytest.fixture
def nodes(served: Served, policies: list[Policy]) -> list[Node]:
    return [Node(served, [policy.endpoint for policy in policies]) for _ in range(2)]


@pytest.fixture
def spread(served: Served, nodes: list[Node]) -> EnvironmentNodes:
    """What a rollout server has of them."""
    made = EnvironmentNodes([node.endpoint for node in nodes], TOKEN)
    served.watch(watched(made))
    served.until(lambda: made.ready)
    return made


async def watched(nodes: EnvironmentNodes) -> None:
    try:
        await nodes.watch()
    finally:
        await nodes.close()


def run(spread: EnvironmentNodes, tag: str, **more: Any) -> Coroutine[Any, Any, bytes]:
    return spread.run("agent", json.dumps({"tag": tag, **more}).encode())


def failure(served: Served, work: Coroutine[Any, Any, bytes]) -> str:
    with pytest.raises(Failed) as caught:
        served.do(work)
    return caught.value.reason


def test_a_turn_is_asked_of_the_rollout_server_that_the_rollout_belongs_to(
    served: Served, spread: EnvironmentNodes, policies: list[Policy]
) -> None:
    for policy in policies:
        answer = served.do(run(spread, f"{policy.endpoint}/abc"))
        assert json.loads(answer)["said"] == policy.name
        assert read_verdict(answer) == (1.0, {"status": 200.0})
        assert [chat[TAG] for chat in policy.seen] == [f"{policy.endpoint}/abc"]
    ended = json.loads(served.do(run(spread, f"{policies[0].endpoint}/ended")))
    assert ended["status"] == 410, "what the policy endpoint answers is what NeMo Gym hears"


def test_a_tag_cannot_send_the_token_elsewhere(served: Served, spread: EnvironmentNodes) -> None:
    elsewhere: list[str] = []

    async def take(request: Request) -> Response:
        elsewhere.append(request.headers.get("authorization", ""))
        return Response()

    address = served.start(Starlette(routes=[Route("/{path:path}", take, methods=["POST"])]))
    for tag in (f"{address}/abc", "abc", "", "/"):
        assert json.loads(served.do(run(spread, tag)))["status"] == 403
    assert elsewhere == []


def test_runs_are_spread_over_the_nodes_by_what_each_has_to_do(
    served: Served, spread: EnvironmentNodes, nodes: list[Node], policies: list[Policy]
) -> None:
    tag = f"{policies[0].endpoint}/hang"
    hanging = [asyncio.run_coroutine_threadsafe(run(spread, tag), served.loop) for _ in range(6)]
    served.until(lambda: len(policies[0].seen) == 6)
    assert [len(node.gym.runs) for node in nodes] == [3, 3]
    for each in hanging:
        each.cancel()
    other = EnvironmentNodes([node.endpoint for node in nodes], TOKEN, first=1)
    served.do(other._look(other._nodes[0]))
    served.do(run(other, f"{policies[0].endpoint}/abc"))
    assert [len(node.gym.runs) for node in nodes] == [3, 4], "another rollout server begins with another node"
    served.do(other.close())


def test_what_a_rollout_server_drops_is_dropped_on_the_node(
    served: Served, spread: EnvironmentNodes, nodes: list[Node], policies: list[Policy]
) -> None:
    dropped = asyncio.run_coroutine_threadsafe(run(spread, f"{policies[1].endpoint}/hang"), served.loop)
    served.until(lambda: len(policies[1].seen) == 1)
    posts: list[asyncio.Task[Any]] = []

    def agents_asked() -> int:
        posts[:] = [task for task in asyncio.all_tasks(served.loop) if "NemoGym._run" in repr(task.get_coro())]
        return len(posts)

    assert served.ask(agents_asked) == 1
    dropped.cancel()
    served.until(lambda: agents_asked() == 0)


def test_a_chat_that_nemo_gym_gives_up_is_given_up_by_the_relay(
    served: Served, nodes: list[Node], policies: list[Policy]
) -> None:
    async def ask_and_leave() -> None:
        async with aiohttp.ClientSession() as session:
            chat = {"messages": [], TAG: f"{policies[0].endpoint}/hang"}
            with pytest.raises(asyncio.TimeoutError):
                url = f"http://{nodes[0].gym.policy}/v1/chat/completions"
                await session.post(url, json=chat, timeout=aiohttp.ClientTimeout(total=0.3))

    served.do(ask_and_leave())
    served.until(lambda: policies[0].dropped == 1)


@pytest.mark.parametrize(
    ("status", "says", "again"),
    [
        (500, "agent_error: the agent answered 500: no such tool", True),
        (422, "row_refused: the agent answered 422: no such tool", False),
    ],
)
def test_a_failure_on_the_node_is_the_rollouts_reason(
    served: Served, spread: EnvironmentNodes, status: int, says: str, again: bool
) -> None:
    reason = failure(served, run(spread, "x", status=status))
    assert reason == says
    assert worth_retrying(reason) is again
    assert failure(served, spread.run("nobody", b"{}")) == "unknown_agent: NeMo Gym has no agent 'nobody'"


def test_a_run_that_failed_because_of_the_judge_says_so(served: Served, policies: list[Policy]) -> None:
    gym = Gym(served)
    relay = PolicyRelay([policies[0].endpoint], TOKEN, "policy", 20)
    judge = JudgeEndpoint(Judge("big", 5, "http://127.0.0.1:9/v1"), "", {})
    server = EnvironmentServer(NemoGym(gym.port), relay, judge)
    nodes = EnvironmentNodes([served.start(server.public(TOKEN))], TOKEN)
    served.watch(server.watch())
    served.watch(watched(nodes))
    served.until(lambda: nodes.usable(-math.inf) and bool(nodes.trouble))
    trouble = "the judge at 127.0.0.1 (judge.url) cannot be asked: it takes no connection"
    reason = failure(served, run(nodes, "x", status=500))
    assert reason == f"agent_error: {trouble}; the agent answered 500: no such tool"
    assert nodes.trouble == trouble
    assert not nodes.ready


def test_a_lost_environment_server_fails_its_runs_alone_and_gets_no_more(
    served: Served, spread: EnvironmentNodes, nodes: list[Node], policies: list[Policy]
) -> None:
    tag = f"{policies[0].endpoint}/hang"
    first, second = (asyncio.run_coroutine_threadsafe(run(spread, tag), served.loop) for _ in range(2))
    served.until(lambda: len(policies[0].seen) == 2)
    nodes[0].end()
    with pytest.raises(Failed) as caught:
        first.result(10)
    assert caught.value.reason.startswith("environment_server_lost: environment-0 ")
    assert worth_retrying(caught.value.reason)
    retried = json.loads(served.do(run(spread, f"{policies[0].endpoint}/retried")))
    assert retried["reward"] == 1.0, "a retry at once does not go where the run was lost"
    served.until(lambda: not spread.ready)
    assert spread.usable(-math.inf)
    assert not second.done()
    assert json.loads(served.do(run(spread, f"{policies[0].endpoint}/abc")))["reward"] == 1.0
    assert [len(node.gym.runs) for node in nodes] == [1, 3]
    assert spread.missing() == "environment-0"
    assert spread.status() == "NeMo Gym 1/1 servers ready on 1/2 environment nodes"
    served.start(nodes[0].server.public(TOKEN), port=int(nodes[0].endpoint.rpartition(":")[2]))
    served.until(lambda: spread.ready)
    assert spread.status() == "NeMo Gym 2/2 servers ready on 2/2 environment nodes"
    second.cancel()


def test_a_lost_nemo_gym_fails_the_runs_of_its_node(
    served: Served, spread: EnvironmentNodes, nodes: list[Node], policies: list[Policy]
) -> None:
    tag = f"{policies[0].endpoint}/hang"
    hanging = [asyncio.run_coroutine_threadsafe(run(spread, tag), served.loop) for _ in range(2)]
    served.until(lambda: len(policies[0].seen) == 2)
    served.end(nodes[1].gym.endpoint)
    with pytest.raises(Failed) as caught:
        hanging[1].result(10)
    # The agent went with it here, so either may be noticed first; both are worth another attempt.
    assert caught.value.reason.partition(":")[0] in ("environment_server_lost", "agent_unreachable", "agent_error")
    served.until(lambda: "environment-1" in spread.missing())
    assert spread.missing() == "its head server of NeMo Gym on environment-1"
    assert spread.usable(-math.inf)
    assert not hanging[0].done()
    hanging[0].cancel()


def test_another_attempt_waits_until_nemo_gym_was_seen_since_the_one_that_failed(
    served: Served, spread: EnvironmentNodes, nodes: list[Node]
) -> None:
    for gym in (spread, nodes[0].server.gym):
        failed_at = served.loop.time()
        assert gym.usable(-math.inf) and not gym.usable(failed_at)
        served.until(lambda gym=gym, failed_at=failed_at: gym.usable(failed_at))


def test_without_the_token_an_environment_server_does_nothing(nodes: list[Node]) -> None:
    for path, data in (("/health", None), ("/run/agent", b"{}")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{nodes[0].endpoint}{path}", data, timeout=5)
        assert caught.value.code == 401
    assert nodes[0].gym.runs == []
