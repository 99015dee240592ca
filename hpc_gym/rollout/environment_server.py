"""The environment server of a node of its own for NeMo Gym: `python -m hpc_gym.rollout.environment_server`, started by
the node's supervisor.

NeMo Gym listens on loopback alone, for it cannot be exposed safely. This server is its door in both directions: rollout
servers hand it runs on the public listener, which is inherited and asks for the job's token; and NeMo Gym's model
servers ask it for the policy and the judge on a listener on loopback.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.secrets import read_secrets
from hpc_gym.rollout import serving
from hpc_gym.rollout.environment_nodes import EnvironmentHealth
from hpc_gym.rollout.gym import NemoGym
from hpc_gym.rollout.judge import JudgeEndpoint
from hpc_gym.rollout.outcomes import Failed
from hpc_gym.rollout.relay import PolicyRelay

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments(serving.ServerArguments):
    """The command line; see `parse`."""

    policy_port: int
    gym_port: int
    rollouts: Sequence[str]
    judges: Sequence[str]


def parse(argv: list[str] | None = None) -> Arguments:
    """The command line as `Arguments`."""
    parser = serving.parser("hpc_gym.rollout.environment_server", __doc__ or "")
    parser.add_argument("--policy-port", required=True, type=int, help="loopback port that NeMo Gym asks")
    parser.add_argument("--gym-port", required=True, type=int, help="loopback port of NeMo Gym's head server")
    parser.add_argument(
        "--rollouts", required=True, type=serving.endpoints, help="HOST:PORT,... of the rollout servers"
    )
    parser.add_argument(
        "--judges", default=(), type=serving.endpoints, help="HOST:PORT,... of those that serve the judge"
    )
    return Arguments(**vars(parser.parse_args(argv)))


class EnvironmentServer:
    """Everything an environment server does.

    ===========================  ==========================================================================
    `GET /health`                `EnvironmentHealth`, JSON, at once whatever still loads
    `POST /run/AGENT`            a row, answered as NeMo Gym's agent does; cancelled when the client is gone.
                                 A failure is a `Problem` with the reason that the rollout gets, status 502
    ===========================  ==========================================================================
    """

    def __init__(self, gym: NemoGym, relay: PolicyRelay, judge: JudgeEndpoint | None = None) -> None:
        self.nonce = secrets.token_hex(8)
        self.gym = gym
        self.relay = relay
        self.judge = judge

    def health(self) -> EnvironmentHealth:
        """How things stand, without asking anybody."""
        judge = self.judge.status() if self.judge else ""
        return EnvironmentHealth(
            ready=self.gym.ready and (self.judge is None or self.judge.up),
            nonce=self.nonce,
            status=", ".join(filter(None, [self.gym.status(), judge])),
            gym_ready=self.gym.answering,
            gym_total=self.gym.total,
            missing="" if self.gym.ready else self.gym.missing(),
            judge=judge,
            judged=self.judge.answered if self.judge else 0,
            trouble=self.judge.trouble if self.judge else "",
            hopeless=self.judge.hopeless if self.judge else "",
        )

    def public(self, token: str) -> ASGIApp:
        """The application of the public listener."""
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/run/{agent}", self._run, methods=["POST"]),
        ]
        return serving.guarded("an environment server", routes, token)

    def loopback(self) -> ASGIApp:
        """The application that NeMo Gym's model servers ask."""
        return Starlette(routes=self.relay.routes() + (self.judge.routes("/judge/v1") if self.judge else []))

    async def watch(self) -> None:
        """Keeps an eye on NeMo Gym and the judge, and tells the supervisor that it does, for ever."""
        watches = [self.gym.watch(), serving.report(lambda: self.health().status)]
        if self.judge is not None:
            watches.append(self.judge.watch())
        await serving.watch_all(watches, self._close)

    async def _close(self) -> None:
        await self.gym.close()
        await self.relay.close()
        if self.judge is not None:
            await self.judge.close()

    async def _health(self, _: Request) -> Response:
        return serving.as_json(self.health())

    async def _run(self, request: Request) -> Response:
        body = await request.body()
        try:
            answer = await serving.until_gone(request, self.gym.run(request.path_params["agent"], body))
        except Failed as failed:
            return serving.problem(502, failed.explained(self.judge.trouble if self.judge else "").reason)
        except ClientDisconnect:
            return serving.GONE
        return Response(answer, media_type="application/json")


def main(argv: list[str] | None = None) -> None:
    """Reads the Plan, then serves until it is told to stop; tells the supervisor why where it cannot."""
    serving.run("the environment server", _run(parse(argv)))


async def _run(arguments: Arguments) -> None:
    plan = Plan.read(arguments.run_dir)
    secret = read_secrets(arguments.secrets)
    public = socket.socket(fileno=arguments.fd)
    loopback = socket.create_server(("127.0.0.1", arguments.policy_port), backlog=4096)
    host, port = public.getsockname()[:2]
    log.info("environment server of %s, pid %d, on %s:%d", arguments.node, os.getpid(), host, port)
    longest = max(environment.timeout_s for environment in plan.environments)
    judge = plan.rollout.judge
    server = EnvironmentServer(
        NemoGym(arguments.gym_port),
        PolicyRelay(arguments.rollouts, secret.token, plan.rollout.model_name, longest),
        JudgeEndpoint(judge, "", secret.env, arguments.judges, secret.token) if judge else None,
    )
    await serving.serve([(server.public(secret.token), public), (server.loopback(), loopback)], server.watch())


if __name__ == "__main__":
    main()
