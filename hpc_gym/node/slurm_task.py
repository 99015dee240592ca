"""`python -m hpc_gym.node.slurm_task FOLDER`: what srun starts on every node: submitit's task, with output files.

Files are named by the global rank, as submitit expects them: in a heterogeneous job, the `%j` and `%t` of
`srun --output` mean the component's own job id and a rank within the component.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Becomes `python -m submitit.core._submit FOLDER`."""
    folder = sys.argv[1]
    stem = f"{folder}/{os.environ['HPC_GYM_JOB_ID']}_{os.environ['SLURM_PROCID']}_log"
    for stream, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{stem}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, stream)
        os.close(file)
    os.execv(sys.executable, [sys.executable, "-u", "-m", "submitit.core._submit", folder])


if __name__ == "__main__":
    main()
