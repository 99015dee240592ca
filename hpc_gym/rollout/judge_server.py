"""The judge server of a node of its own for the judge: `python -m hpc_gym.rollout.judge_server`, started by the node's
supervisor.

The judge's vLLM listens on a Unix socket; this server is its door for the other nodes. Its listener is inherited and
asks for the job's token.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.secrets import read_secrets
from hpc_gym.rollout import serving
from hpc_gym.rollout.judge import JudgeEndpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments(serving.ServerArguments):
    """The command line; see `parse`."""

    private_dir: str


def parse(argv: list[str] | None = None) -> Arguments:
    """The command line as `Arguments`."""
    parser = serving.parser("hpc_gym.rollout.judge_server", __doc__ or "")
    parser.add_argument("--private-dir", required=True, help="folder of the socket judge.sock")
    return Arguments(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> None:
    """Reads the Plan, then serves until it is told to stop; tells the supervisor why where it cannot."""
    serving.run("the judge server", _run(parse(argv)))


async def _run(arguments: Arguments) -> None:
    settings = Plan.read(arguments.run_dir).rollout.judge
    if settings is None:
        raise ValueError("the Plan has no judge")
    secret = read_secrets(arguments.secrets)
    public = socket.socket(fileno=arguments.fd)
    host, port = public.getsockname()[:2]
    log.info("judge server of %s, pid %d, on %s:%d", arguments.node, os.getpid(), host, port)
    judge = JudgeEndpoint(settings, arguments.private_dir, secret.env)
    app = serving.guarded("a judge server", judge.public_routes(), secret.token)
    watch = serving.watch_all([judge.watch(), serving.report(judge.status)], judge.close)
    await serving.serve([(app, public)], watch)


if __name__ == "__main__":
    main()
