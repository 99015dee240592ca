"""The rollout server of a node: `python -m hpc_gym.rollout.server`, started by the node's supervisor.

Its public listener is inherited and asks for the attempt's token. Where NeMo Gym runs on this node, the policy endpoint
is a second listener on loopback; where it has nodes of its own, they ask for the policy on the public one. It serves at
once, whatever still loads behind it, and `GET /health` says what that is.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from hpc_gym.plan.plan import Environment, Plan
from hpc_gym.protocol import messages
from hpc_gym.protocol.secrets import Secrets, read_secrets
from hpc_gym.rollout import serving
from hpc_gym.rollout.batches import Batches
from hpc_gym.rollout.environment_nodes import EnvironmentNodes
from hpc_gym.rollout.gym import Gym, NemoGym
from hpc_gym.rollout.judge import JudgeEndpoint
from hpc_gym.rollout.policy import PolicyEndpoint
from hpc_gym.rollout.replicas import Replicas
from hpc_gym.rollout.runs import BadRow, Rollouts
from hpc_gym.rollout.weights import Weights, WeightsFailed, WeightsRefused

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments(serving.ServerArguments):
    """The command line; see `parse`."""

    private_dir: str
    policy_port: int | None = None
    gym_port: int | None = None
    environments: Sequence[str] = ()
    judges: Sequence[str] = ()


def parse(argv: list[str] | None = None) -> Arguments:
    """The command line as `Arguments`."""
    parser = serving.parser("hpc_gym.rollout.server", __doc__ or "")
    parser.add_argument("--policy-port", type=int, help="loopback port of the policy endpoint")
    parser.add_argument("--gym-port", type=int, help="loopback port of NeMo Gym's head server")
    parser.add_argument(
        "--environments", type=serving.endpoints, help="HOST:PORT,... instead of a NeMo Gym of this node"
    )
    parser.add_argument("--judges", type=serving.endpoints, help="HOST:PORT,... instead of a judge of this node")
    parser.add_argument("--private-dir", required=True, help="folder of the sockets vllm-K.sock")
    parser.set_defaults(environments=(), judges=())
    arguments = Arguments(**vars(parser.parse_args(argv)))
    if bool(arguments.environments) == (arguments.gym_port is not None and arguments.policy_port is not None):
        parser.error("give either --environments, or --policy-port and --gym-port")
    return arguments


class RolloutServer:
    """Everything a rollout server does, and its HTTP interface (`hpc_gym.protocol.messages`)."""

    def __init__(
        self,
        environments: Sequence[Environment],
        policy: PolicyEndpoint,
        private_dir: str,
        replicas: int,
        max_concurrent: int,
        gym: Gym,
        judge: JudgeEndpoint | None = None,
    ) -> None:
        """`judge`: the one that is asked here, or that this node serves to others."""
        self.nonce = secrets.token_hex(8)
        self.replicas = Replicas(private_dir, replicas)
        self.gym = gym
        self.policy = policy
        self.judge = judge

        def trouble() -> str:
            return judge.trouble if judge else gym.trouble

        self.rollouts = Rollouts(environments, self.replicas, self.gym, policy, max_concurrent, trouble)
        self.batches = Batches(self.rollouts)
        self.weights = Weights(self.replicas)

    def health(self) -> messages.Health:
        """How things stand, without asking anybody."""
        replicas = self.replicas.health()
        up = sum(replica.state != "loading" for replica in replicas)
        status = [f"vLLM {up}/{len(replicas)} ready", self.gym.status(), *([self.judge.status()] if self.judge else [])]
        return messages.Health(
            ready=up == len(replicas) and self.gym.ready and (self.judge is None or self.judge.up),
            nonce=self.nonce,
            status=", ".join(status),
            replicas=replicas,
            gym_ready=self.gym.answering,
            gym_total=self.gym.total,
            running=self.rollouts.running,
            queued=self.rollouts.queued,
            judged=self.judge.answered if self.judge else self.gym.judged,
            hopeless=self.judge.hopeless if self.judge else self.gym.hopeless,
        )

    def public(self, token: str, environment_nodes: bool = False) -> ASGIApp:
        """The application of the public listener; `environment_nodes` ask there for the policy and the judge."""
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/rollouts", self._rollouts, methods=["POST"]),
            Route("/weights/init", self._weights_init, methods=["POST"]),
            Route("/weights/update", self._weights_update, methods=["POST"]),
            Route("/abort", self._abort, methods=["POST"]),
        ]
        if environment_nodes:
            routes += self.policy.routes() + (self.judge.public_routes() if self.judge else [])
        return serving.guarded("a rollout server", routes, token)

    def loopback(self) -> ASGIApp:
        """The application that NeMo Gym on this node asks for the policy and the judge."""
        return Starlette(routes=self.policy.routes() + (self.judge.routes("/judge/v1") if self.judge else []))

    async def watch(self) -> None:
        """Keeps an eye on vLLM and NeMo Gym, and tells the supervisor that it does, for ever."""
        watches = [self.replicas.watch(), self.gym.watch(), serving.report(lambda: self.health().status)]
        if self.judge is not None:
            watches.append(self.judge.watch())
        await serving.watch_all(watches, self._close)

    async def _close(self) -> None:
        await self.gym.close()
        await self.replicas.close()
        if self.judge is not None:
            await self.judge.close()

    async def _health(self, _: Request) -> Response:
        return serving.as_json(self.health())

    async def _rollouts(self, request: Request) -> Response:
        try:
            batch = msgspec.msgpack.decode(await request.body(), type=messages.RolloutBatch)
            rows = self.batches.prepare(batch)
        except (msgspec.MsgspecError, BadRow) as error:
            return serving.problem(400, str(error))
        return StreamingResponse(self.batches.run(batch, rows), media_type="application/octet-stream")

    async def _weights_init(self, request: Request) -> Response:
        try:
            await self.weights.init(msgspec.json.decode(await request.body(), type=messages.WeightsInit))
        except (msgspec.MsgspecError, WeightsRefused, WeightsFailed) as error:
            return serving.problem(502 if isinstance(error, WeightsFailed) else 400, str(error))
        return serving.as_json({})

    async def _weights_update(self, request: Request) -> Response:
        try:
            await self.weights.update(msgspec.json.decode(await request.body(), type=messages.WeightsUpdate))
        except (msgspec.MsgspecError, WeightsRefused, WeightsFailed) as error:
            return serving.problem(502 if isinstance(error, WeightsFailed) else 400, str(error))
        return serving.as_json({})

    async def _abort(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=messages.Abort)
        except msgspec.MsgspecError as error:
            return serving.problem(400, str(error))
        dropped = self.batches.abort(wanted.batch)
        log.info("aborted %d rollouts on request", dropped)
        return serving.as_json({"dropped": dropped})


def main(argv: list[str] | None = None) -> None:
    """Reads the Plan, then serves until it is told to stop; tells the supervisor why where it cannot."""
    serving.run("the rollout server", _run(parse(argv)))


async def _run(arguments: Arguments) -> None:
    plan = Plan.read(arguments.run_dir)
    secret = read_secrets(arguments.secrets)
    public = socket.socket(fileno=arguments.fd)
    host, port = public.getsockname()[:2]
    log.info("rollout server of %s, pid %d, on %s:%d", arguments.node, os.getpid(), host, port)
    settings = plan.rollout
    apart = bool(arguments.environments)
    server = RolloutServer(
        plan.environments,
        PolicyEndpoint(settings.model_name, settings.max_model_len, f"{host}:{port}" if apart else ""),
        arguments.private_dir,
        settings.replicas,
        settings.max_concurrent,
        _gym(arguments, secret),
        _judge(plan, arguments, secret),
    )
    served = [(server.public(secret.token, apart), public)]
    if not apart:
        loopback = socket.create_server(("127.0.0.1", arguments.policy_port or 0), backlog=4096)
        served.append((server.loopback(), loopback))
    await serving.serve(served, server.watch())


def _gym(arguments: Arguments, secret: Secrets) -> Gym:
    if arguments.gym_port is not None:
        return NemoGym(arguments.gym_port)
    number = int(arguments.node.rpartition("-")[2])
    return EnvironmentNodes(arguments.environments, secret.token, first=number)


def _judge(plan: Plan, arguments: Arguments, secret: Secrets) -> JudgeEndpoint | None:
    """The judge that is asked here, or served here to the environment nodes."""
    judge = plan.rollout.judge
    if judge is None or (arguments.environments and (arguments.judges or judge.url is not None)):
        return None
    return JudgeEndpoint(judge, arguments.private_dir, secret.env, arguments.judges, secret.token)


if __name__ == "__main__":
    main()
