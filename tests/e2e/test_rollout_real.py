"""The rollout server on the real vLLM and the real NeMo Gym with three unmodified environments and a random model."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from rollout_node import MAX_MODEL_LEN, RolloutNode, example_rows, rollout_node, until
from starlette.requests import Request

from hpc_gym.protocol.client import RolloutClient, RolloutServerError
from hpc_gym.protocol.messages import RolloutRequest, Sampling, WeightsInit, WeightsUpdate
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.rollout.conversation import Conversation
from hpc_gym.rollout.policy import PolicyEndpoint
from hpc_gym.rollout.replicas import Replicas
from hpc_gym.rollout.vllm import Vllm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutNode]:
    with rollout_node(tmp_path_factory.mktemp("node")) as started:
        yield started


@pytest.fixture(scope="module")
def client(node: RolloutNode) -> Iterator[RolloutClient]:
    with node.client() as connected:
        said: list[str] = []
        try:
            connected.wait_ready(240, said.append)
        except RolloutServerError as error:
            pytest.fail(f"{error}\n{node.log('server')[-2000:]}\n{node.log('vllm')[-3000:]}\n{node.log('gym')[-3000:]}")
        assert "vLLM 0/1 ready" in said[0], "it must answer while vLLM still loads"
        yield connected


def requests_for(environments: Sequence[str], each: int, tokens: int = 192) -> list[RolloutRequest]:
    """`each` rollouts of every example row. A required tool choice makes even a random model take several turns."""
    return [
        RolloutRequest(
            environment=environment,
            row=row,
            group=group,
            sampling=Sampling(
                temperature=1.0,
                top_p=1.0,
                max_output_tokens=tokens,
                tool_choice="required" if environment == "workplace_assistant" else None,
            ),
        )
        for environment in environments
        for group, row in enumerate(example_rows(environment))
        for _ in range(each)
    ]


def turns_by_tag(node: RolloutNode) -> dict[str, list[tuple[list[int], list[int]]]]:
    """What vLLM was asked to continue and how it did, per rollout, in order of the turns."""
    found: dict[str, dict[int, tuple[list[int], list[int]]]] = defaultdict(dict)
    for path, request, answer in node.generations.seen:
        if path == "/inference/v1/generate":
            tag, _, turn = request["request_id"].rpartition("-")
            found[tag][int(turn)] = (request["token_ids"], answer["choices"][0]["token_ids"])
    return {tag: [turns[number] for number in sorted(turns)] for tag, turns in found.items()}


def chats_by_tag(node: RolloutNode) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path, request, _ in node.chats.seen:
        if path == "/v1/chat/completions":
            found[request["hpc_gym_rollout"]].append(request)
    return found


def rendered_again(node: RolloutNode, chat: dict[str, Any]) -> list[int]:
    """The prompt that a server without the splice would have continued."""
    keys = ("messages", "tools", "tool_choice", "model")
    body = msgspec.json.encode({key: chat[key] for key in keys if key in chat})

    async def render() -> list[int]:
        vllm = Vllm("vllm-0", str(node.vllm_socket))
        try:
            return (await vllm.render(body, 60)).token_ids
        finally:
            await vllm.close()

    return asyncio.run(render())


def test_every_rollout_is_contiguous_and_without_the_splice_none_would_be(
    node: RolloutNode, client: RolloutClient
) -> None:
    requests = requests_for(["workplace_assistant"], each=6, tokens=256)
    requests += requests_for(["reasoning_gym", "mcqa"], each=2)
    trajectories = client.run(requests)
    assert [trajectory.index for trajectory in trajectories] == list(range(len(requests)))
    for request, trajectory in zip(requests, trajectories, strict=True):
        check_whole(request, trajectory)
    by_tag = turns_by_tag(node)
    transitions = diverged = 0
    chats = chats_by_tag(node)
    for tag, turns in by_tag.items():
        for (prompt, generated), (following, _) in itertools.pairwise(turns):
            assert following[: len(prompt) + len(generated)] == prompt + generated
            transitions += 1
        for chat, (prompt, _) in list(zip(chats[tag], turns, strict=False))[1:4]:
            diverged += rendered_again(node, chat) != prompt
    assert transitions >= 20
    assert diverged >= 1
    whole = {tuple(prompt + generated) for prompt, generated in (turns[-1] for turns in by_tag.values())}
    for trajectory in trajectories:
        if trajectory.outcome is not Outcome.FAILED:
            assert tuple(np.concatenate([trajectory.prompt_ids, trajectory.completion_ids]).tolist()) in whole


def check_whole(request: RolloutRequest, trajectory: Trajectory) -> None:
    """A trajectory is either whole, or failed for a reason of its environment's own and without a reward."""
    if trajectory.outcome is Outcome.FAILED:
        # NeMo Gym 0.4.0 cannot take numbers beyond 64 bits, which a random model writes now and then.
        assert "64-bit range" in trajectory.reason
        assert np.isnan(trajectory.reward)
        assert trajectory.attempts == 2
        return
    assert np.isfinite(trajectory.reward)
    assert trajectory.prompt_ids.size > 0
    mask = trajectory.policy_mask.astype(bool)
    assert mask.any()
    assert np.isfinite(trajectory.logprobs[mask]).all()
    assert (trajectory.logprobs[mask] <= 0).all()
    assert np.isnan(trajectory.logprobs[~mask]).all()
    assert (trajectory.weight_versions[mask] == 0).all()
    assert (trajectory.weight_versions[~mask] == -1).all()
    if request.environment != "workplace_assistant":
        assert trajectory.turns == 1
    else:
        assert (trajectory.turns > 1) == (not mask.all())


def test_only_the_token_opens_the_server(node: RolloutNode, client: RolloutClient) -> None:
    for path in ("/health", "/rollouts", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer another"}):
            assert status_of(f"http://{node.endpoint}{path}", headers) == 401
    with node.client("another") as stranger, pytest.raises(RolloutServerError, match=r"401.*token"):
        stranger.run(requests_for(["mcqa"], each=1))


def test_only_the_tag_of_a_live_rollout_opens_the_policy(node: RolloutNode, client: RolloutClient) -> None:
    url = f"http://127.0.0.1:{node.policy_port}/v1/chat/completions"
    chat = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
    assert status_of(url, {}, chat) == 403
    assert status_of(url, {}, chat | {"hpc_gym_rollout": "guessed"}) == 403
    client.run(requests_for(["mcqa"], each=1)[:1])
    over = next(reversed(chats_by_tag(node)))
    assert status_of(url, {}, chat | {"hpc_gym_rollout": over}) == 410


def status_of(url: str, headers: dict[str, str], body: Any = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_bad_requests_are_refused_with_a_sentence(client: RolloutClient) -> None:
    good = requests_for(["mcqa"], each=1)[0]
    for bad, words in (
        (msgspec.structs.replace(good, environment="sudoku"), r"no environment 'sudoku'.*mcqa, reasoning_gym"),
        (msgspec.structs.replace(good, row=b"{"), "row 1: the row is no row of NeMo Gym"),
        (msgspec.structs.replace(good, row=b'{"a": 1}'), "row 1: the row has no 'responses_create_params'"),
    ):
        with pytest.raises(RolloutServerError, match=words):
            client.run([good, bad])


# What follows drives the policy endpoint itself, on the same vLLM.


class Agent:
    """Stands where NeMo Gym stands: sends chats under the tag of a conversation."""

    def __init__(self, node: RolloutNode, deadline_s: float = 60) -> None:
        self.endpoint = PolicyEndpoint("policy", MAX_MODEL_LEN)
        self.replicas = Replicas(str(node.private), 1)
        self.deadline_s = deadline_s

    async def __aenter__(self) -> Agent:
        await self.replicas.all[0].look()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.replicas.close()

    def open(self) -> Conversation:
        deadline = asyncio.get_running_loop().time() + self.deadline_s
        return self.endpoint.open(self.replicas.all[0], 0, deadline)

    async def chat(self, conversation: Conversation, messages: list[dict[str, Any]], **more: Any) -> tuple[int, Any]:
        body = {"messages": messages, "max_tokens": 24, "hpc_gym_rollout": conversation.tag} | more

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        answer = await self.endpoint.chat_completions(Request(scope, receive))
        return answer.status_code, json.loads(bytes(answer.body))


def said(answer: Any) -> dict[str, Any]:
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


async def test_odd_texts_do_not_break_a_conversation(node: RolloutNode, client: RolloutClient) -> None:
    """Special tokens as text, Unicode that tokenizers treat badly, generations cut before their end."""
    odd = ["<|im_end|>\n<|im_start|>assistant\n", "e\u0301\u200d\U0001f469\u200d\U0001f680 \ufffd", "  \n\t", "\u2028x"]
    async with Agent(node) as agent:
        conversation = agent.open()
        messages = [{"role": "user", "content": "begin"}]
        for text in odd:
            before = list(conversation.tokens)
            status, answer = await agent.chat(conversation, messages)
            assert status == 200, answer
            assert conversation.tokens[: len(before)] == before
            messages += [said(answer), {"role": "user", "content": text}]
        assert conversation.turns == len(odd)


@pytest.mark.parametrize("change", ["words", "order", "dropped"])
async def test_a_rewritten_history_fails_the_rollout(node: RolloutNode, client: RolloutClient, change: str) -> None:
    async with Agent(node) as agent:
        conversation = agent.open()
        first = [{"role": "user", "content": "one"}]
        _, answer = await agent.chat(conversation, first)
        message = said(answer)
        rewritten = {
            "words": [*first, message | {"content": f"{message['content']}!"}],
            "order": [message, *first],
            "dropped": first,
        }[change]
        status, answer = await agent.chat(conversation, [*rewritten, {"role": "user", "content": "two"}])
        assert status == 422
        assert conversation.failure.startswith("history_rewritten")
        assert (await agent.chat(conversation, first))[0] == 410


async def test_what_the_endpoint_does_not_do_is_refused_clearly(node: RolloutNode, client: RolloutClient) -> None:
    async with Agent(node) as agent:
        messages = [{"role": "user", "content": "one"}]
        for more, word in (({"n": 2}, "'n'"), ({"stream": True}, "'stream'"), ({"temperature": -1}, "temperature")):
            status, answer = await agent.chat(agent.open(), messages, **more)
            assert status == 400
            assert word in answer["error"]["message"]


async def test_a_conversation_that_outgrows_the_context_is_truncated(node: RolloutNode, client: RolloutClient) -> None:
    async with Agent(node) as agent:
        conversation = agent.open()
        messages = [{"role": "user", "content": "one"}]
        _, answer = await agent.chat(conversation, messages)
        messages += [said(answer), {"role": "user", "content": "many words " * MAX_MODEL_LEN}]
        status, answer = await agent.chat(conversation, messages)
        # The words by which NeMo Gym's adapter knows an overflow, so that it ends the rollout instead of failing it.
        assert (status, "context length" in answer["error"]["message"]) == (400, True)
        assert conversation.truncated
        assert not conversation.failure
        assert conversation.turns == 1


async def test_what_is_dropped_stops_in_vllm_and_is_refused_later(node: RolloutNode, client: RolloutClient) -> None:
    async with Agent(node) as agent:
        conversation = agent.open()
        messages = [{"role": "user", "content": "one"}]
        long = asyncio.ensure_future(agent.chat(conversation, messages, max_tokens=11000, ignore_eos=True))
        vllm = agent.replicas.all[0].vllm
        await eventually(vllm, 1)
        agent.endpoint.close(conversation)
        status, _ = await long
        assert status == 410
        await eventually(vllm, 0)
        assert (await agent.chat(conversation, messages))[0] == 410


async def eventually(vllm: Vllm, running: int) -> None:
    for _ in range(400):
        text = (await vllm.request("GET", "/metrics", None, 5)).decode()
        (line,) = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        if float(line.split()[-1]) == running:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"vLLM does not come to {running} running requests")


async def test_a_deadline_ends_a_turn(node: RolloutNode, client: RolloutClient) -> None:
    async with Agent(node, deadline_s=0.5) as agent:
        conversation = agent.open()
        status, _ = await agent.chat(
            conversation, [{"role": "user", "content": "one"}], max_tokens=11000, ignore_eos=True
        )
        assert status == 424
        assert conversation.failure.startswith("deadline")
        await eventually(agent.replicas.all[0].vllm, 0)


# What follows breaks parts of the node, the gravest last.


def test_rows_survive_a_restart_of_the_rollout_server(node: RolloutNode, client: RolloutClient) -> None:
    requests = requests_for(["reasoning_gym", "mcqa"], each=1, tokens=2000)
    found: list[Trajectory] = []
    run = threading.Thread(target=lambda: found.extend(client.run(requests)))
    run.start()
    until(lambda: (health := client.health()[0]) is not None and health.running > 0, 20, "rollouts are running")
    nonce = client.health()[0].nonce  # type: ignore[union-attr]
    node.kill("server")
    time.sleep(0.5)
    node.start_server()
    run.join(120)
    assert [trajectory.outcome for trajectory in found].count(Outcome.FAILED) == 0
    assert len(found) == len(requests)
    assert client.health()[0].nonce != nonce  # type: ignore[union-attr]


def test_aborted_rollouts_come_back_as_failed(node: RolloutNode, client: RolloutClient) -> None:
    found: list[Trajectory] = []
    requests = requests_for(["reasoning_gym"], each=1, tokens=10000)
    run = threading.Thread(target=lambda: found.extend(client.run(requests)))
    run.start()
    until(lambda: (health := client.health()[0]) is not None and health.running > 0, 20, "rollouts are running")
    client.abort()
    run.join(20)
    assert {trajectory.reason.partition(":")[0] for trajectory in found} <= {"aborted", ""}
    assert any(trajectory.reason.startswith("aborted") for trajectory in found)
    until(lambda: (health := client.health()[0]) is not None and health.running == 0, 10, "nothing runs")


def test_weights_are_labelled_and_stale_replicas_are_not_used(node: RolloutNode, client: RolloutClient) -> None:
    (health,) = client.wait_ready(10)
    (replica,) = health.replicas
    assert (replica.state, replica.weight_version, replica.world_size) == ("ready", 0, 1)
    join = msgspec.Raw(b'{"transport": "filesystem"}')
    weights = msgspec.Raw(json.dumps({"folder": str(node.model)}).encode())
    with pytest.raises(RolloutServerError, match="vllm-0 was restarted"):
        client.weights_init(0, WeightsInit(incarnations=["another"], init_info=[join]), 30).result()
    client.weights_init(0, WeightsInit(incarnations=[replica.incarnation], init_info=[join]), 30).result()
    update = WeightsUpdate(version=7, incarnations=[replica.incarnation], update_info=[weights])
    client.weights_update(0, update, 60).result()
    requests = requests_for(["mcqa"], each=1)
    for trajectory in client.run(requests, weight_version=7):
        assert (trajectory.weight_versions[trajectory.policy_mask.astype(bool)] == 7).all()
    for trajectory in client.run(requests, weight_version=8):
        assert trajectory.outcome is Outcome.FAILED
        assert trajectory.reason.startswith("weights_stale")
    broken = msgspec.structs.replace(update, version=8, update_info=[msgspec.Raw(b'{"folder": "/nowhere"}')])
    with pytest.raises(RolloutServerError, match="vllm-0 failed at /update_weights"):
        client.weights_update(0, broken, 60).result()
    for trajectory in client.run(requests):
        assert trajectory.reason.startswith("weights_stale")
    client.weights_update(0, msgspec.structs.replace(update, version=8), 60).result()
    assert all(trajectory.outcome is not Outcome.FAILED for trajectory in client.run(requests, weight_version=8))
    # What a rollout server leaves that is killed in the middle of an update.
    asyncio.run(ask_vllm(node, "/pause?mode=keep", "/start_weight_update"))
    with pytest.raises(RolloutServerError, match="already active"):
        client.weights_update(0, msgspec.structs.replace(update, version=8), 60).result()
    client.weights_init(0, WeightsInit(incarnations=[replica.incarnation], init_info=[join]), 30).result()
    client.weights_update(0, msgspec.structs.replace(update, version=8), 60).result()
    assert all(trajectory.outcome is not Outcome.FAILED for trajectory in client.run(requests, weight_version=8))


async def ask_vllm(node: RolloutNode, *paths: str) -> None:
    vllm = Vllm("vllm-0", str(node.vllm_socket))
    for path in paths:
        await vllm.request("POST", path, b"{}", 60)
    await vllm.close()


def test_a_lost_environment_server_gives_failures_and_no_rewards(node: RolloutNode, client: RolloutClient) -> None:
    requests = requests_for(["mcqa"], each=4, tokens=1024)
    found: list[Trajectory] = []
    run = threading.Thread(target=lambda: found.extend(client.run(requests, weight_version=8)))
    run.start()
    until(lambda: (health := client.health()[0]) is not None and health.running > 0, 20, "rollouts are running")
    with urllib.request.urlopen(f"http://127.0.0.1:{node.gym_port}/server_instances", timeout=10) as answer:
        (server,) = [each for each in json.load(answer) if each["process_name"] == "mcqa"]
    for process in (*psutil.Process(server["pid"]).children(recursive=True), psutil.Process(server["pid"])):
        process.kill()
    run.join(100)
    assert len(found) == len(requests)
    for trajectory in found:
        assert trajectory.outcome is Outcome.FAILED
        assert trajectory.reason.startswith("environment_server_lost: mcqa"), trajectory.reason
        assert np.isnan(trajectory.reward)


def replica_state(client: RolloutClient) -> str:
    (health,) = client.health()
    return health.replicas[0].state if health is not None else ""


def test_a_lost_vllm_is_noticed_and_its_rows_fail_as_stale(node: RolloutNode, client: RolloutClient) -> None:
    node.kill("vllm")
    until(lambda: replica_state(client) == "loading", 20, "the loss is noticed")
    for trajectory in client.run(requests_for(["reasoning_gym"], each=1), weight_version=8):
        assert trajectory.reason.startswith("weights_stale: weights 8 are wanted, vllm-0 is starting")
