"""What runs on every node of a job: `supervise(run_dir)`, called by submitit's task (which pickles it by reference)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import TracebackType

from hpc_gym.errors import UserError
from hpc_gym.node import tree
from hpc_gym.node.guardian import guard
from hpc_gym.protocol.attempt import Outcome


class AttemptFailed(Exception):
    """The attempt failed; the text is `Outcome.sentence()`."""


def supervise(run_dir: str) -> str:
    """Runs this node's part of the attempt to its end and returns the outcome's sentence.

    Raises AttemptFailed where the attempt failed, and exits with the outcome's code where it was cancelled or is to
    be requeued (which is no result of the job). On node rank 0 the sentence is the last line on stdout.
    """
    if os.environ.get("HPC_GYM_LAUNCHER") == str(os.getppid()):
        tree.signal_when_parent_dies(signal.SIGTERM)
    outcome = guard(Path(run_dir))
    first = (os.environ.get("HPC_GYM_NODE_RANK") or os.environ.get("SLURM_PROCID")) == "0"
    if outcome.kind == "failed":
        if first:
            sys.excepthook = _say_it_last
        raise AttemptFailed(outcome.sentence())
    if first:
        print(outcome.sentence(), flush=True)
    if outcome.kind != "completed":
        sys.exit(outcome.exit_code)
    return outcome.sentence()


def _say_it_last(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    # submitit logs and raises again: without this a traceback through submitit would follow the line that matters.
    print(error if issubclass(kind, AttemptFailed) else f"{kind.__name__}: {error}", flush=True)


def main() -> int:
    """`python -m hpc_gym.node.supervisor RUN_DIR`: the same without submitit. Returns the exit code."""
    try:
        supervise(sys.argv[1])
    except AttemptFailed as error:
        print(error, flush=True)
        return Outcome("failed").exit_code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
