"""One rank of a GRPO run: `python -m hpc_gym.training.grpo --run-dir RUN`.

Environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; HPC_GYM_ROLLOUT_SERVERS (`host:port,...`),
HPC_GYM_SECRETS (path of the attempt's secrets) and HPC_GYM_ATTEMPT. Exit codes: 0 trained and exported, 85 stopped at a
checkpoint (SIGUSR2), 2 the request was wrong, 1 anything else, with the cause told to the supervisor as X_FAILURE.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import STOPPED_AT_CHECKPOINT
from hpc_gym.protocol.client import RolloutClient
from hpc_gym.protocol.notify import notify
from hpc_gym.protocol.secrets import read_secrets
from hpc_gym.training.stopping import StopRequested, StopSignal

EXPORT = "model"
_RESTART_S = 120.0
"""Until a rollout server that was started again answers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs this rank and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m hpc_gym.training.grpo")
    parser.add_argument("--run-dir", type=Path, required=True)
    run_dir = parser.parse_args(arguments).run_dir
    stop = StopSignal()
    try:
        return _run(Plan.read(run_dir), stop)
    except StopRequested:
        return STOPPED_AT_CHECKPOINT
    except BaseException as error:
        return _report(error)


def _run(plan: Plan, stop: StopSignal) -> int:
    # Before torch, transformers and TRL are imported. Nothing is fetched inside a job.
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "WANDB_SILENT": "true",
    }.items():
        os.environ.setdefault(name, value)
    notify(STATUS="importing torch and TRL")
    first = os.environ["RANK"] == "0"
    # transformers and TRL import what they find; on two cores that is a second each, per rank, that vLLM could use.
    for name in ("peft",) if first and plan.training.wandb else ("peft", "wandb"):
        sys.modules[name] = None  # type: ignore[assignment]
    from hpc_gym.training.run import TrainingRun

    with connect(plan) as client:
        run = TrainingRun(plan, client, stop, int(os.environ["HPC_GYM_ATTEMPT"]))
        code = 1
        try:
            code = run.execute(Path(plan.run_dir) / EXPORT)
        except StopRequested:
            code = STOPPED_AT_CHECKPOINT
        except BaseException as error:
            # At once, before anything is closed: the other ranks fail as soon as this one is gone.
            code = _report(error)
        finally:
            run.close(code)
    return code


def _report(error: BaseException) -> int:
    """Tells the log and the supervisor why this rank fails; returns its exit code."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        notify(X_FAILURE=str(error))
        return 2
    traceback.print_exception(error)
    notify(X_FAILURE=f"{type(error).__name__}: {error}")
    return 1


def connect(plan: Plan) -> RolloutClient:
    """The client of the job's rollout servers. The secret variables of the attempt enter this process's environment."""
    secrets = read_secrets(os.environ["HPC_GYM_SECRETS"])
    for name, value in secrets.env.items():
        os.environ.setdefault(name, value)
    # The supervisors come first: they start a server that hangs again.
    alive_s = max(process.alive_within_s for node in plan.nodes for process in node.processes if process.listen)
    endpoints = os.environ["HPC_GYM_ROLLOUT_SERVERS"].split(",")
    return RolloutClient(endpoints, secrets.token, gone_after_s=alive_s + _RESTART_S)


def leave(code: int) -> Any:
    """Ends the process at once. At the interpreter's own end a process group whose peers are gone would keep it
    waiting, and a thread of gloo's that is still at work may abort it ("terminate called without an active exception").
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
