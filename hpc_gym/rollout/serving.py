"""What the servers of hpc-gym on the nodes have in common: listeners, the token, signs of life to the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hpc_gym.protocol import messages
from hpc_gym.protocol.notify import notify
from hpc_gym.rollout.connections import SERVERS_KEEP_S

log = logging.getLogger(__name__)

Result = TypeVar("Result")

WATCHDOG_S = 2.0
GONE = Response(status_code=499)
"""For a client that is no longer there to read it."""


@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    """The part of the command line that all servers have in common; see `parser`."""

    run_dir: str
    node: str
    fd: int
    secrets: str


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser of `ServerArguments`, to which a server adds its own; `--help` shows the description's first
    paragraph.
    """
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description.partition("\n\n")[0])
    made.add_argument("--run-dir", required=True, help="run directory, with plan.json")
    made.add_argument("--node", required=True, help="name of this node in logs")
    made.add_argument("--fd", required=True, type=int, help="inherited listening socket of the public endpoint")
    made.add_argument("--secrets", required=True, help="secrets file of the attempt")
    return made


class RequireToken:
    """Answers 401 to every request that does not carry the token, before anything else is looked at."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                await problem(401, "the request does not carry the token of this job")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def guarded(what: str, routes: Sequence[Route], token: str) -> ASGIApp:
    """The application of a public listener. `what` answers, as `a rollout server`."""

    async def no_such(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return problem(status, f"{what} does not answer {request.method} {request.url.path}")

    return RequireToken(Starlette(routes=list(routes), exception_handlers={404: no_such, 405: no_such}), token)


def endpoints(text: str) -> tuple[str, ...]:
    """`HOST:PORT,HOST:PORT` taken apart."""
    return tuple(filter(None, text.split(",")))


def as_json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem(status: int, text: str) -> Response:
    """An error of hpc-gym's own interfaces."""
    return as_json(messages.Problem(error=text), status)


def openai_error(status: int, text: str, kind: str = "invalid_request_error") -> Response:
    """An error as OpenAI's API tells it, for NeMo Gym's model servers."""
    return as_json({"error": {"message": text, "type": kind, "code": status}}, status)


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client gives the request up: then raises ClientDisconnect.

    To be called once the request's body has been read.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Listener(uvicorn.Server):
    """uvicorn without its own signal handling: two of them share a loop and stop together."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def listener(app: ASGIApp) -> uvicorn.Server:
    """A server for the application, which the caller stops by `should_exit`."""
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_keep_alive=SERVERS_KEEP_S,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )
    return _Listener(config)


async def serve(served: Sequence[tuple[ASGIApp, socket.socket]], watch: Coroutine[Any, Any, None]) -> None:
    """Serves each application on its socket until SIGTERM or SIGINT. Raises what ended `watch`, if anything did."""
    listeners = [listener(app) for app, _ in served]

    def stop() -> None:
        for each in listeners:
            each.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = [asyncio.ensure_future(each.serve([bound])) for each, (_, bound) in zip(listeners, served, strict=True)]
    watching = asyncio.ensure_future(watch)
    await asyncio.wait([*serving, watching], return_when=asyncio.FIRST_COMPLETED)
    stop()
    watching.cancel()
    await asyncio.gather(*serving)
    with contextlib.suppress(asyncio.CancelledError):
        await watching


async def watch_all(watches: Sequence[Coroutine[Any, Any, None]], close: Callable[[], Awaitable[None]]) -> None:
    """Runs all of `watches`, which never end by themselves; however that ends, none goes on, and `close` is called."""
    running = [asyncio.ensure_future(watch) for watch in watches]
    try:
        await asyncio.gather(*running)
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await close()


async def report(status: Callable[[], str]) -> None:
    """Tells the supervisor that this process serves, and how things stand, for ever."""
    said = ""
    notify(READY=1)
    while True:
        text = status()
        if text != said:
            log.info("%s", text)
        said = text
        notify(WATCHDOG=1, STATUS=text)
        await asyncio.sleep(WATCHDOG_S)


def run(what: str, work: Coroutine[Any, Any, None]) -> None:
    """The main program of a server: runs `work`, and tells the supervisor why where `what` cannot go on."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        uvloop.run(work)
    except Exception as error:
        notify(X_FAILURE=f"{what} failed: {error}")
        raise
