"""`python -m hpc_gym.node.slurm_task FOLDER`: what srun starts on every node: submitit's task, with output files.

Files are named by the global rank, as submitit expects them: in a heterogeneous job, the `%j` and `%t` of
`srun --output` mean the component's own job id and a rank within the component.
"""

from __future__ import annotations

import os
import socket
import sys

SAYS = "hpc-gym cannot begin on {host}: "
"""How it begins what it tells srun where the files cannot be written, to which anything else goes."""


def main() -> None:
    """Becomes `python -m submitit.core._submit FOLDER`."""
    folder = sys.argv[1]
    stem = f"{folder}/{os.environ['HPC_GYM_JOB_ID']}_{os.environ['SLURM_PROCID']}_log"
    for stream, suffix in ((1, "out"), (2, "err")):
        try:
            file = os.open(f"{stem}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            sys.exit(f"{SAYS.format(host=host)}{folder} cannot be written to there: {error.strerror}")
        os.dup2(file, stream)
        os.close(file)
    os.execv(sys.executable, [sys.executable, "-u", "-m", "submitit.core._submit", folder])


if __name__ == "__main__":
    main()
