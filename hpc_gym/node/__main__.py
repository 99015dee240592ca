"""`python -m hpc_gym.node RUN_DIR`: one node of one attempt. Started by the guardian only, see
`hpc_gym.node.guardian`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from hpc_gym.node import tree
from hpc_gym.node.context import NodeContext
from hpc_gym.node.node_runner import NodeRunner
from hpc_gym.protocol.attempt import Outcome


def main() -> int:
    """Runs the node; leaves the outcome in the private directory. Returns its exit code."""
    run_dir, private_dir = Path(sys.argv[1]), Path(os.environ["HPC_GYM_PRIVATE_DIR"])
    tree.become_subreaper()
    tree.signal_when_parent_dies(signal.SIGHUP)
    if os.getppid() != int(os.environ["HPC_GYM_GUARDIAN"]):
        return 1
    context = NodeContext.from_environment(run_dir, private_dir)

    async def run() -> Outcome:
        return await NodeRunner(context).run()

    outcome = asyncio.run(run())
    (private_dir / "outcome.json").write_text(outcome.to_json())
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
