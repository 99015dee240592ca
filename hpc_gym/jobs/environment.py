"""What submitit asks about the job from inside it, on every node."""

from __future__ import annotations

import os
from typing import Any

from submitit.core.job_environment import JobEnvironment


class HpcgymJobEnvironment(JobEnvironment):
    """One task per node; found by submitit through `SUBMITIT_EXECUTOR=hpcgym`.

    The coordinator alone decides on checkpoints and requeues, so submitit's own signal handlers, which requeue from
    global rank 0 on SIGUSR2, are not installed.
    """

    @property
    def raw_job_id(self) -> str:
        # In the steps of a heterogeneous job, SLURM_JOB_ID is the leader's.
        return os.environ.get("HPC_GYM_JOB_ID") or os.environ["SLURM_JOB_ID"]

    @property
    def global_rank(self) -> int:
        return int(os.environ.get("HPC_GYM_NODE_RANK") or os.environ.get("SLURM_PROCID") or 0)

    @property
    def num_tasks(self) -> int:
        return int(os.environ.get("HPC_GYM_NODES") or os.environ.get("SLURM_NTASKS") or 1)

    @property
    def num_nodes(self) -> int:
        return self.num_tasks

    @property
    def node(self) -> int:
        return self.global_rank

    @property
    def local_rank(self) -> int:
        return 0

    def _handle_signals(self, paths: Any, submission: Any) -> None:
        """Leaves SIGTERM, SIGCONT and SIGUSR2 to the supervisor."""
