"""`python -m hpc_gym.node RUN_DIR`: one node of one attempt. Started by the guardian only, see
`hpc_gym.node.guardian`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

from hpc_gym.node import tree
from hpc_gym.node.context import NodeContext
from hpc_gym.node.guardian import UNFIT
from hpc_gym.node.left_behind import hold
from hpc_gym.node.node_runner import NodeRunner
from hpc_gym.protocol.attempt import Outcome


def main() -> int:
    """Runs the node; leaves the outcome to the guardian in the private directory. Returns its exit code."""
    tree.become_subreaper()
    # Until the runner can take it: a guardian that dies from here on is cleaned up after.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    tree.signal_when_parent_dies(signal.SIGHUP)
    guardian = int(os.environ["HPC_GYM_GUARDIAN"])
    if os.getppid() != guardian:
        return 1
    context = NodeContext.from_environment(Path(sys.argv[1]))
    try:
        context.make_private_dir()
        hold(context.private_dir)
    except OSError as error:
        print(f"{context.private_dir}: {error.strerror}", flush=True)
        return UNFIT

    async def run() -> Outcome:
        return await NodeRunner(context).run()

    outcome = asyncio.run(run())
    if os.getppid() == guardian:
        (context.private_dir / "outcome.json").write_text(outcome.to_json())
    else:
        shutil.rmtree(context.private_dir, ignore_errors=True)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
