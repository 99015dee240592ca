"""Stands in for the rollout servers: the same calls as `RolloutClient`, answered by one `vllm serve` or by a script.

What is behind it is real: vLLM's own endpoints, or nothing at all where a test wants to say exactly what a rollout
gave.
"""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from hpc_gym.protocol.client import RolloutServerError
from hpc_gym.protocol.messages import Health, Replica, RolloutRequest, WeightsInit, WeightsUpdate
from hpc_gym.protocol.trajectory import Outcome, Trajectory


def post(url: str, body: Any, timeout_s: float = 60.0) -> Any:
    """The JSON answer of a POST. Raises RolloutServerError with the server's own words."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise RolloutServerError(f"{url}: {error.code}: {error.read()[:500].decode(errors='replace')}") from None
    return json.loads(text) if text else None


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Boundary:
    """The part that both have in common: one server, one replica, always ready."""

    incarnation = "1"

    def __enter__(self) -> Boundary:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_ready(self, deadline_s: float, on_status: Callable[[str], None] | None = None) -> list[Health]:
        replica = Replica(state="ready", incarnation=self.incarnation, weight_version=0, world_size=1)
        return [
            Health(ready=True, nonce="1", status="", replicas=[replica], gym_ready=0, gym_total=0, running=0, queued=0)
        ]

    def abort(self, batch: str | None = None, timeout_s: float = 5.0) -> None:
        pass

    def weights_init(self, server: int, message: WeightsInit, timeout_s: float) -> Future[Any]:
        return in_thread(lambda: None)

    def weights_update(self, server: int, message: WeightsUpdate, timeout_s: float) -> Future[Any]:
        return in_thread(lambda: None)


class Scripted(Boundary):
    """Every rollout is what `script(request, index)` says."""

    def __init__(self, script: Callable[[RolloutRequest, int], Trajectory], seconds: float = 0.0) -> None:
        self._script = script
        self._seconds = seconds

    def run(
        self, requests: Sequence[RolloutRequest], *, weight_version: int = 0, on_progress: Any = None
    ) -> list[Trajectory]:
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(0.02)
        return [self._script(request, index) for index, request in enumerate(requests)]


class OneVllm(Boundary):
    """Rollouts are completions of one `vllm serve` at `url`: the row's `prompt` (ids), `tokens` new tokens, the
    row's reward rule.
    """

    def __init__(self, url: str, skip_versions: Sequence[int] = ()) -> None:
        self._url = url
        self._skip = set(skip_versions)
        self._pool = ThreadPoolExecutor(16)

    def weights_init(self, server: int, message: WeightsInit, timeout_s: float) -> Future[Any]:
        info = json.loads(bytes(message.init_info[0]))
        return in_thread(lambda: post(self._url + "/init_weight_transfer_engine", {"init_info": info}, timeout_s))

    def weights_update(self, server: int, message: WeightsUpdate, timeout_s: float) -> Future[Any]:
        info = json.loads(bytes(message.update_info[0]))

        def update() -> None:
            post(self._url + "/pause?mode=keep", {})
            try:
                post(self._url + "/start_weight_update", {})
                post(self._url + "/update_weights", {"update_info": info}, timeout_s)
                post(self._url + "/finish_weight_update", {"weight_version": str(message.version)})
            finally:
                post(self._url + "/resume", {})
                post(self._url + "/reset_prefix_cache", {})

        return in_thread(update)

    def run(
        self, requests: Sequence[RolloutRequest], *, weight_version: int = 0, on_progress: Any = None
    ) -> list[Trajectory]:
        return list(self._pool.map(self._one, requests, range(len(requests))))

    def _one(self, request: RolloutRequest, index: int) -> Trajectory:
        row = json.loads(request.row)
        prompt = row["prompt"]
        answer = self.complete(prompt, row["tokens"], temperature=1.0)
        ids = np.array(answer["token_ids"], np.int32)
        return Trajectory(
            index=index,
            outcome=Outcome.OK,
            prompt_ids=np.array(prompt, np.int32),
            completion_ids=ids,
            policy_mask=np.ones(len(ids), np.uint8),
            logprobs=np.array(answer["logprobs"]["token_logprobs"], np.float32),
            weight_versions=np.full(len(ids), weight_version_of(answer), np.int32),
            reward=float(np.mean(ids < 150)),
            turns=1,
        )

    def complete(self, prompt: list[int], tokens: int, temperature: float) -> Any:
        """vLLM's completion of a prompt of token ids, with the log-probabilities of what it chose."""
        body = {
            "model": "policy",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": temperature,
            "logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        return post(self._url + "/v1/completions", body)["choices"][0]


def weight_version_of(answer: Any) -> int:
    return int(answer.get("weight_version") or -1)


def trajectory(
    index: int, prompt: Sequence[int], completion: Sequence[int], reward: float, logprobs: Sequence[float] | None = None
) -> Trajectory:
    """A rollout of one turn, by hand."""
    size = len(completion)
    return Trajectory(
        index=index,
        outcome=Outcome.OK,
        prompt_ids=np.array(prompt, np.int32),
        completion_ids=np.array(completion, np.int32),
        policy_mask=np.ones(size, np.uint8),
        logprobs=np.array([math.nan] * size if logprobs is None else logprobs, np.float32),
        weight_versions=np.zeros(size, np.int32),
        reward=reward,
        turns=1,
    )
