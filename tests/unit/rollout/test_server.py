"""The rollout server's public side, served for real, while neither vLLM nor NeMo Gym is there; and its client."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hpc_gym.plan.plan import Environment
from hpc_gym.protocol.client import RolloutClient, RolloutServerError
from hpc_gym.protocol.messages import RolloutRequest, Sampling, WeightsInit
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.rollout.gym import NemoGym
from hpc_gym.rollout.policy import PolicyEndpoint
from hpc_gym.rollout.server import RolloutServer
from hpc_gym.rollout.serving import listener

TOKEN = "s3cret"
REQUEST = RolloutRequest(
    environment="quick", row=b'{"responses_create_params": {"input": "hi"}}', group=0, sampling=Sampling()
)


class Served:
    """A rollout server on a thread, on a port that it keeps when it is stopped, as a supervisor would."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self._folder = folder
        self.start()

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        environments = [Environment("quick", "agent", (), timeout_s=0.6, max_attempts=3)]
        self._ready = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            policy = PolicyEndpoint("policy", 100)
            server = RolloutServer(environments, policy, str(self._folder), 1, 8, NemoGym(unused_port()))
            self._listener = listener(server.public(TOKEN))

            async def serve() -> None:
                watching = asyncio.ensure_future(server.watch())
                self._ready.set()
                await self._listener.serve([self.socket.dup()])
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

            self._loop.run_until_complete(serve())

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert self._ready.wait(5)

    def stop(self) -> None:
        self._listener.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path)
    yield server
    server.stop()
    server.socket.close()


@pytest.fixture
def client(served: Served) -> Iterator[RolloutClient]:
    with RolloutClient([served.endpoint], TOKEN, gone_after_s=1) as connected:
        yield connected


def test_it_answers_before_anything_else_is_there(client: RolloutClient, served: Served) -> None:
    (health,) = client.health()
    assert health is not None
    assert (health.ready, health.gym_total, health.replicas[0].state) == (False, 0, "loading")
    said: list[str] = []
    with pytest.raises(RolloutServerError, match=r"not ready after 0.6 s: .*vLLM 0/1 ready, NeMo Gym 0/\? servers"):
        client.wait_ready(0.6, said.append)
    assert said == [f"{served.endpoint}: vLLM 0/1 ready, NeMo Gym 0/? servers ready"]


@pytest.mark.parametrize("header", ["", "Bearer ", "Bearer s3cre", "Bearer s3cret ", "Basic s3cret", "bearer s3cret"])
def test_without_the_token_nothing_is_answered(served: Served, header: str) -> None:
    headers = {"Authorization": header} if header else {}
    for path in ("/health", "/nothing"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"http://{served.endpoint}{path}", headers=headers))
        assert caught.value.code == 401
        assert caught.value.read() == b'{"error":"the request does not carry the token of this job"}'


def test_unknown_paths_are_answered_with_a_sentence(served: Served) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"http://{served.endpoint}/nothing", headers=headers))
    assert (caught.value.code, b"does not answer GET /nothing" in caught.value.read()) == (404, True)


def test_rows_without_a_replica_fail_at_their_deadline(client: RolloutClient) -> None:
    progress: list[tuple[int, int]] = []
    found = client.run([REQUEST] * 20, on_progress=lambda *counts: progress.append(counts))
    assert [trajectory.index for trajectory in found] == list(range(20))
    assert {trajectory.outcome for trajectory in found} == {Outcome.FAILED}
    assert {trajectory.reason.partition(":")[0] for trajectory in found} == {"replica_lost"}
    assert progress[-1] == (20, 20)


def test_rows_that_want_weights_nobody_has_fail_at_once(client: RolloutClient) -> None:
    start = time.monotonic()
    (found,) = client.run([REQUEST], weight_version=3)
    assert found.reason == "weights_stale: weights 3 are wanted, vllm-0 is starting"
    assert time.monotonic() - start < 0.5


def test_weights_for_a_replica_that_is_not_there_are_refused(client: RolloutClient) -> None:
    message = WeightsInit(incarnations=[""], init_info=[msgspec.Raw(b"{}")])
    with pytest.raises(RolloutServerError, match="vllm-0 was restarted or is not there"):
        client.weights_init(0, message, 5).result()


def test_rows_outlive_a_restart_of_the_server(client: RolloutClient, served: Served) -> None:
    (before,) = client.health()
    found: list[Trajectory] = []
    run = threading.Thread(target=lambda: found.extend(client.run([REQUEST] * 30)))
    run.start()
    time.sleep(0.3)
    served.stop()
    served.start()
    run.join(20)
    assert [trajectory.reason.partition(":")[0] for trajectory in found] == ["replica_lost"] * 30
    (after,) = client.health()
    assert before is not None
    assert after is not None
    assert before.nonce != after.nonce


def test_a_server_that_is_gone_for_good_is_an_error(client: RolloutClient, served: Served) -> None:
    served.stop()
    served.socket.close()
    with pytest.raises(RolloutServerError, match=r"is gone: not reached for .* s .*; 2 of 2 rollouts are missing"):
        client.run([REQUEST] * 2)
    assert client.health() == [None]
    served.socket = socket.create_server(("127.0.0.1", 0))
    served.start()


def test_an_exception_in_the_waiting_thread_drops_the_rollouts(client: RolloutClient) -> None:
    import signal

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Stop):
            client.run([REQUEST] * 100)
    finally:
        signal.signal(signal.SIGALRM, before)
    time.sleep(0.3)
    (health,) = client.health()
    assert health is not None
    assert (health.running, health.queued) == (0, 0)
