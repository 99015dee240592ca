"""The trainers' side of the rollout servers: a synchronous facade over aiohttp on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp
import msgspec

from hpc_gym.protocol import codec
from hpc_gym.protocol.messages import (
    Abort,
    Health,
    Problem,
    RolloutBatch,
    RolloutRequest,
    WeightsInit,
    WeightsUpdate,
)
from hpc_gym.protocol.trajectory import Trajectory

Result = TypeVar("Result")

SILENCE_S = 30.0
"""A working server sends a sign of life every few seconds; without one for so long the connection is given up."""
RETRY_S = 0.5


class RolloutServerError(RuntimeError):
    """A rollout server refused a request, failed, or is gone for good; the text says which and why."""


class _Unreachable(Exception):
    """The connection failed or broke: worth trying again, the server may be restarting in place."""


class RolloutClient:
    """Speaks to all rollout servers of a job. Every method may be called from any thread.

    `endpoints` are `host:port`. A server that was restarted in place is found again and gets its unfinished rows
    anew; one that cannot be reached for `gone_after_s` seconds is gone, and the call that needs it raises
    RolloutServerError.
    """

    def __init__(self, endpoints: Sequence[str], token: str, *, gone_after_s: float = 120.0) -> None:
        if not endpoints:
            raise ValueError("a rollout client needs the endpoint of at least one rollout server")
        self.endpoints = tuple(endpoints)
        self._token = token
        self._gone_after_s = gone_after_s
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; the servers drop what this client still has in flight."""
        if self._thread.is_alive():
            with contextlib.suppress(TimeoutError):
                self._submit(self._shut()).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def health(self, timeout_s: float = 10.0) -> list[Health | None]:
        """What each server says of itself, in the order of `endpoints`; None where it does not answer in time."""
        return self._wait(self._health_of_all(timeout_s))

    def wait_ready(self, deadline_s: float, on_status: Callable[[str], None] | None = None) -> list[Health]:
        """Returns the servers' health once all are ready.

        `on_status` is called, in this thread, with each new line that says what is still missing. Raises
        RolloutServerError, which says the same, after `deadline_s` seconds, and where waiting is of no use.
        """
        end = time.monotonic() + deadline_s
        said = ""
        while True:
            found = self.health(max(0.1, min(5.0, end - time.monotonic())))
            lines = ["does not answer" if health is None else health.status for health in found]
            status = "; ".join(f"{name}: {line}" for name, line in zip(self.endpoints, lines, strict=True))
            if on_status is not None and status != said:
                on_status(status)
            said = status
            if hopeless := [health.hopeless for health in found if health is not None and health.hopeless]:
                raise RolloutServerError(hopeless[0])
            ready = [health for health in found if health is not None and health.ready]
            if len(ready) == len(found):
                return ready
            if time.monotonic() >= end:
                raise RolloutServerError(f"rollout servers are not ready after {deadline_s:g} s: {status}")
            time.sleep(min(RETRY_S, max(0.0, end - time.monotonic())))

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        weight_version: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Trajectory]:
        """One trajectory per request, in order, `Trajectory.index` being the request's position.

        Blocks until the last one: every rollout has a deadline on the server. Rows are spread over the servers by
        `group`, so that all ranks send a group to the same one. Replicas with weights older than `weight_version` are
        not used: a row that finds no other fails with a reason that starts with `weights_stale`.
        `on_progress(finished, total)` is called from the client's thread. Raises RolloutServerError when a server
        refuses the rows or is gone for good. An exception raised meanwhile in the calling thread (a signal handler's,
        KeyboardInterrupt) drops the rollouts.
        """
        results: dict[int, Trajectory] = {}

        def finished(trajectories: list[Trajectory]) -> None:
            results.update((trajectory.index, trajectory) for trajectory in trajectories)
            if on_progress is not None:
                on_progress(len(results), len(requests))

        shares: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            shares.setdefault(self.endpoints[request.group % len(self.endpoints)], []).append(index)
        self._wait(self._run(shares, requests, weight_version, results, finished))
        return [results[index] for index in range(len(requests))]

    def weights_init(self, server: int, message: WeightsInit, timeout_s: float) -> Future[None]:
        """Lets the replicas of server number `server` join a transfer group; the sender joins it meanwhile."""
        return self._submit(self._command(self.endpoints[server], "/weights/init", message, timeout_s))

    def weights_update(self, server: int, message: WeightsUpdate, timeout_s: float) -> Future[None]:
        """Lets the replicas of server number `server` receive weights; the sender sends them meanwhile.

        The result raises RolloutServerError when a replica could not take them: it then needs `weights_init` again.
        """
        return self._submit(self._command(self.endpoints[server], "/weights/update", message, timeout_s))

    def abort(self, batch: str | None = None, timeout_s: float = 5.0) -> None:
        """Drops the rollouts in flight on all servers, whoever asked for them; passes over a server that is silent."""

        async def abort_all() -> None:
            calls = (self._command(name, "/abort", Abort(batch=batch), timeout_s) for name in self.endpoints)
            await asyncio.gather(*calls, return_exceptions=True)

        self._wait(abort_all())

    # The rest runs on the client's thread.

    def _submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._token}"},
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    async def _health_of_all(self, timeout_s: float) -> list[Health | None]:
        async def one(name: str) -> Health | None:
            try:
                timeout = aiohttp.ClientTimeout(total=timeout_s)
                async with self._http().get(f"http://{name}/health", timeout=timeout) as answer:
                    await _refused(name, answer)
                    return msgspec.json.decode(await answer.read(), type=Health)
            except (aiohttp.ClientError, TimeoutError, OSError):
                return None
            except msgspec.MsgspecError as error:
                raise RolloutServerError(f"{name} is no rollout server of this hpc-gym: {error}") from error

        return list(await asyncio.gather(*(one(name) for name in self.endpoints)))

    async def _command(self, name: str, path: str, message: msgspec.Struct, timeout_s: float) -> None:
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            data = msgspec.json.encode(message)
            async with self._http().post(f"http://{name}{path}", data=data, timeout=timeout) as answer:
                await _refused(name, answer)
                await answer.read()
        except TimeoutError as error:
            raise RolloutServerError(f"rollout server {name}: {path} was not done within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RolloutServerError(f"rollout server {name}: {path} failed: {error}") from error

    async def _run(
        self,
        shares: dict[str, list[int]],
        requests: Sequence[RolloutRequest],
        weight_version: int,
        results: dict[int, Trajectory],
        finished: Callable[[list[Trajectory]], None],
    ) -> None:
        tasks = [
            asyncio.create_task(self._run_share(name, share, requests, weight_version, results, finished))
            for name, share in shares.items()
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _run_share(
        self,
        name: str,
        share: list[int],
        requests: Sequence[RolloutRequest],
        weight_version: int,
        results: dict[int, Trajectory],
        finished: Callable[[list[Trajectory]], None],
    ) -> None:
        reached = time.monotonic()

        def alive() -> None:
            nonlocal reached
            reached = time.monotonic()

        while missing := [index for index in share if index not in results]:
            batch = RolloutBatch(
                id=uuid.uuid4().hex,
                rows=[requests[index] for index in missing],
                indices=missing,
                weight_version=weight_version,
            )
            try:
                await self._stream(name, batch, finished, alive)
            except _Unreachable as error:
                silent = time.monotonic() - reached
                if silent > self._gone_after_s:
                    raise RolloutServerError(
                        f"rollout server {name} is gone: not reached for {silent:.0f} s ({error.__cause__ or error}); "
                        f"{len(missing)} of {len(share)} rollouts are missing"
                    ) from error
                await asyncio.sleep(RETRY_S)

    async def _stream(
        self, name: str, batch: RolloutBatch, finished: Callable[[list[Trajectory]], None], alive: Callable[[], None]
    ) -> None:
        """Asks for the batch and hands over each frame as it comes. Raises _Unreachable when the connection breaks."""
        wanted = set(batch.indices)
        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE_S)
            data = msgspec.msgpack.encode(batch)
            async with self._http().post(f"http://{name}/rollouts", data=data, timeout=timeout) as answer:
                await _refused(name, answer)
                while wanted:
                    prefix = await answer.content.readexactly(codec.PREFIX_BYTES)
                    rest = await answer.content.readexactly(codec.frame_bytes(prefix))
                    trajectories = codec.decode(prefix + rest)
                    alive()
                    if not wanted.issuperset(trajectory.index for trajectory in trajectories):
                        raise RolloutServerError(f"rollout server {name} answered with rollouts nobody asked for")
                    wanted.difference_update(trajectory.index for trajectory in trajectories)
                    if trajectories:
                        finished(trajectories)
        except (aiohttp.ClientError, TimeoutError, OSError, asyncio.IncompleteReadError, codec.FrameError) as error:
            raise _Unreachable(f"connection lost: {error!r}") from error


async def _refused(name: str, answer: aiohttp.ClientResponse) -> None:
    """Raises RolloutServerError with the server's own sentence when the answer is an error."""
    if answer.status == 503:
        raise aiohttp.ClientConnectionError("it is stopping")
    if answer.status != 200:
        body = await answer.read()
        try:
            text = msgspec.json.decode(body, type=Problem).error
        except msgspec.MsgspecError:
            text = body[:300].decode(errors="replace")
        raise RolloutServerError(f"rollout server {name} answered {answer.status}: {text}")
