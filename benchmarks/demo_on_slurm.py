"""How soon the demo's job, of real vLLM, NeMo Gym, TRL and DeepSpeed, trains again after what happens to it on Slurm.

    python benchmarks/demo_on_slurm.py

Runs `tests/slurm/test_demo_on_slurm.py`, which notes the times. Needs what `tests/slurm/cluster/README.md` says, and
the runtimes; takes about eight minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import record

TEST = Path(__file__).parent.parent / "tests" / "slurm" / "test_demo_on_slurm.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures"
        environment = {**os.environ, "HPC_GYM_FIGURES": str(path), "HPC_GYM_REQUIRE_SLURM": "1"}
        subprocess.run([sys.executable, "-m", "pytest", "-q", str(TEST)], env=environment, check=True)
        figures = [json.loads(line) for line in path.read_text().splitlines()]
    lines = ["| event | time |", "|---|---|"]
    lines += [f"| {figure['event']} | {figure['seconds']:.1f} s |" for figure in figures]
    lines += [
        "",
        "Three nodes (one with vLLM and NeMo Gym, two with a trainer each, unless another number is said) on the cores",
        "of one machine. A job trains again when a whole step is done; most of that time goes into loading programs",
        "anew, and into Slurm's wait",
        f"before a requeued job starts ({figures[0]['requeue_wait']} s here, `cred_expire`).",
        "By `benchmarks/demo_on_slurm.py`.",
    ]
    record("Slurm: the demo's job", "\n".join(lines))


if __name__ == "__main__":
    main()
