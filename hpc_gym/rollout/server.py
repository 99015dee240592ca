"""The rollout server of a node: `python -m hpc_gym.rollout.server`, started by the node's supervisor.

Its public listener is inherited and asks for the attempt's token; the policy endpoint is a second one on loopback. It
serves at once, whatever still loads behind it, and `GET /health` says what that is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hpc_gym.plan.plan import Environment, Plan
from hpc_gym.protocol import messages
from hpc_gym.protocol.notify import notify
from hpc_gym.protocol.secrets import read_secrets
from hpc_gym.rollout.batches import Batches
from hpc_gym.rollout.gym import NemoGym
from hpc_gym.rollout.judge import JudgeEndpoint
from hpc_gym.rollout.policy import PolicyEndpoint
from hpc_gym.rollout.replicas import Replicas
from hpc_gym.rollout.runs import BadRow, Rollouts
from hpc_gym.rollout.weights import Weights, WeightsFailed, WeightsRefused

log = logging.getLogger(__name__)

WATCHDOG_S = 2.0
KEEP_ALIVE_S = 75
"""Longer than any client keeps an idle connection: it is the client that closes it, so no request is lost on a
closing one.
"""


@dataclass(frozen=True)
class Arguments:
    """The command line; see `parse`."""

    run_dir: str
    node: str
    fd: int
    policy_port: int
    gym_port: int
    private_dir: str
    secrets: str


def parse(argv: list[str] | None = None) -> Arguments:
    """The command line as `Arguments`."""
    parser = argparse.ArgumentParser(prog="python -m hpc_gym.rollout.server", description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", required=True, help="run directory, with plan.json")
    parser.add_argument("--node", required=True, help="name of this node in logs")
    parser.add_argument("--fd", required=True, type=int, help="inherited listening socket of the public endpoint")
    parser.add_argument("--policy-port", required=True, type=int, help="loopback port of the policy endpoint")
    parser.add_argument("--gym-port", required=True, type=int, help="loopback port of NeMo Gym's head server")
    parser.add_argument("--private-dir", required=True, help="folder of the sockets vllm-K.sock")
    parser.add_argument("--secrets", required=True, help="secrets file of the attempt")
    return Arguments(**vars(parser.parse_args(argv)))


class RolloutServer:
    """Everything a rollout server does, and its HTTP interface (`hpc_gym.protocol.messages`)."""

    def __init__(
        self,
        environments: Sequence[Environment],
        policy: PolicyEndpoint,
        private_dir: str,
        replicas: int,
        max_concurrent: int,
        gym_port: int,
        judge: JudgeEndpoint | None = None,
    ) -> None:
        self.nonce = secrets.token_hex(8)
        self.replicas = Replicas(private_dir, replicas)
        self.gym = NemoGym(gym_port, lambda lost: self.rollouts.lost(lost))
        self.policy = policy
        self.judge = judge
        self.rollouts = Rollouts(environments, self.replicas, self.gym, policy, max_concurrent)
        self.batches = Batches(self.rollouts)
        self.weights = Weights(self.replicas)

    def health(self) -> messages.Health:
        """How things stand, without asking anybody."""
        replicas = self.replicas.health()
        up = sum(replica.state != "loading" for replica in replicas)
        gym = f"{self.gym.answering}/{self.gym.total or '?'}"
        return messages.Health(
            ready=up == len(replicas) and self.gym.ready and (self.judge is None or self.judge.up),
            nonce=self.nonce,
            status=f"vLLM {up}/{len(replicas)} ready, NeMo Gym {gym} servers ready{self._judge_status()}",
            replicas=replicas,
            gym_ready=self.gym.answering,
            gym_total=self.gym.total,
            running=self.rollouts.running,
            queued=self.rollouts.queued,
            judged=self.judge.answered if self.judge else 0,
        )

    def _judge_status(self) -> str:
        if self.judge is None:
            return ""
        return ", judge ready" if self.judge.up else ", judge loading"

    def public(self, token: str) -> ASGIApp:
        """The application of the public listener."""
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/rollouts", self._rollouts, methods=["POST"]),
            Route("/weights/init", self._weights_init, methods=["POST"]),
            Route("/weights/update", self._weights_update, methods=["POST"]),
            Route("/abort", self._abort, methods=["POST"]),
        ]
        return RequireToken(Starlette(routes=routes, exception_handlers={404: _no_such, 405: _no_such}), token)

    def loopback(self) -> ASGIApp:
        """The application of the policy endpoint."""
        routes = [
            Route("/v1/chat/completions", self.policy.chat_completions, methods=["POST"]),
            Route("/v1/models", self.policy.models, methods=["GET"]),
        ]
        if self.judge is not None:
            routes += self.judge.routes("/judge/v1")
        return Starlette(routes=routes)

    async def watch(self) -> None:
        """Keeps an eye on vLLM and NeMo Gym, and tells the supervisor that it does, for ever."""
        watched = [self.replicas.watch(), self.gym.watch(), self._report()]
        if self.judge is not None:
            watched.append(self.judge.watch())
        watches = [asyncio.ensure_future(watch) for watch in watched]
        try:
            await asyncio.gather(*watches)
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await self.gym.close()
            await self.replicas.close()
            if self.judge is not None:
                await self.judge.close()

    async def _report(self) -> None:
        said = ""
        notify(READY=1)
        while True:
            status = self.health().status
            if status != said:
                log.info("%s", status)
            said = status
            notify(WATCHDOG=1, STATUS=status)
            await asyncio.sleep(WATCHDOG_S)

    async def _health(self, _: Request) -> Response:
        return _json(self.health())

    async def _rollouts(self, request: Request) -> Response:
        try:
            batch = msgspec.msgpack.decode(await request.body(), type=messages.RolloutBatch)
            rows = self.batches.prepare(batch)
        except (msgspec.MsgspecError, BadRow) as error:
            return _problem(400, str(error))
        return StreamingResponse(self.batches.run(batch, rows), media_type="application/octet-stream")

    async def _weights_init(self, request: Request) -> Response:
        try:
            await self.weights.init(msgspec.json.decode(await request.body(), type=messages.WeightsInit))
        except (msgspec.MsgspecError, WeightsRefused, WeightsFailed) as error:
            return _problem(502 if isinstance(error, WeightsFailed) else 400, str(error))
        return _json({})

    async def _weights_update(self, request: Request) -> Response:
        try:
            await self.weights.update(msgspec.json.decode(await request.body(), type=messages.WeightsUpdate))
        except (msgspec.MsgspecError, WeightsRefused, WeightsFailed) as error:
            return _problem(502 if isinstance(error, WeightsFailed) else 400, str(error))
        return _json({})

    async def _abort(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=messages.Abort)
        except msgspec.MsgspecError as error:
            return _problem(400, str(error))
        dropped = self.batches.abort(wanted.batch)
        log.info("aborted %d rollouts on request", dropped)
        return _json({"dropped": dropped})


class RequireToken:
    """Answers 401 to every request that does not carry the token, before anything else is looked at."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                await _problem(401, "the request does not carry the token of this job")(scope, receive, send)
                return
        await self._app(scope, receive, send)


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
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )
    return _Listener(config)


async def serve(server: RolloutServer, token: str, public: socket.socket, loopback: socket.socket) -> None:
    """Serves on both sockets until SIGTERM or SIGINT. Raises what ended the watch over vLLM and NeMo Gym, if
    anything did.
    """
    listeners = [listener(server.public(token)), listener(server.loopback())]

    def stop() -> None:
        for listener in listeners:
            listener.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    sockets = [public, loopback]
    serving = [asyncio.ensure_future(listener.serve([each])) for listener, each in zip(listeners, sockets, strict=True)]
    watching = asyncio.ensure_future(server.watch())
    await asyncio.wait([*serving, watching], return_when=asyncio.FIRST_COMPLETED)
    stop()
    watching.cancel()
    await asyncio.gather(*serving)
    with contextlib.suppress(asyncio.CancelledError):
        await watching


def main(argv: list[str] | None = None) -> None:
    """Reads the Plan, then serves until it is told to stop; tells the supervisor why where it cannot."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        uvloop.run(_run(arguments))
    except Exception as error:
        notify(X_FAILURE=f"the rollout server failed: {error}")
        raise


async def _run(arguments: Arguments) -> None:
    plan = Plan.read(arguments.run_dir)
    secret = read_secrets(arguments.secrets)
    public = socket.socket(fileno=arguments.fd)
    loopback = socket.create_server(("127.0.0.1", arguments.policy_port), backlog=4096)
    host, port = public.getsockname()[:2]
    log.info("rollout server of %s, pid %d, on %s:%d", arguments.node, os.getpid(), host, port)
    settings = plan.rollout
    server = RolloutServer(
        plan.environments,
        PolicyEndpoint(settings.model_name, settings.max_model_len),
        arguments.private_dir,
        settings.replicas,
        settings.max_concurrent,
        arguments.gym_port,
        JudgeEndpoint(settings.judge, arguments.private_dir, secret.env) if settings.judge else None,
    )
    await serve(server, secret.token, public, loopback)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _problem(status: int, text: str) -> Response:
    return Response(msgspec.json.encode(messages.Problem(error=text)), status, media_type="application/json")


async def _no_such(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _problem(status, f"a rollout server does not answer {request.method} {request.url.path}")


if __name__ == "__main__":
    main()
