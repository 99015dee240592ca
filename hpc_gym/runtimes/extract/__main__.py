"""`python -m hpc_gym.runtimes.extract` (`make tables`): makes `tables/*.json` again from the built runtimes.

With `--inside NAME` it runs in a runtime itself, where only the standard library and the runtime's packages are: it
prints the table of that name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
from pathlib import Path

TABLES = {"vllm": "inference-cpu", "grpo": "train-cpu", "deepspeed": "train-cpu", "gym": "gym"}
"""The runtime that each table is read from. Options do not differ between the CPU and the CUDA build of a program."""

_PACKAGE = Path(__file__).resolve().parents[2]


def extract(name: str) -> str:
    """The text of the table of that name, read from its built runtime.

    Raises UserError when the runtime is not built, RuntimeError when the program in it could not be read.
    """
    from hpc_gym.errors import UserError
    from hpc_gym.runtimes.spec import is_built, spec_of

    spec = spec_of(TABLES[name])
    if not is_built(spec):
        raise UserError(f"runtime {spec.name} is not built: run `hpc-gym runtimes build {spec.name}`")
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "DS_ACCELERATOR": "cpu"}
    answer = subprocess.run(
        [spec.python, "-P", "-m", "hpc_gym.runtimes.extract", "--inside", name],
        env=os.environ | offline | {"PYTHONPATH": str(_PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        raise RuntimeError(f"table {name} could not be read from {spec.root}:\n{answer.stderr[-2000:]}")
    # Programs print warnings of their own when they are imported: the table is the last line.
    table = json.loads(answer.stdout.splitlines()[-1])
    return json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes the tables named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Make the option tables from the built runtimes.")
    parser.add_argument("names", nargs="*", choices=[[], *TABLES], help="tables to make; default: all")
    parser.add_argument("--inside", metavar="NAME", help="print the table, from within its runtime")
    arguments = parser.parse_args()
    if arguments.inside:
        module = importlib.import_module(f"hpc_gym.runtimes.extract.{arguments.inside}_table")
        print(json.dumps(module.table()))
        return
    for name in arguments.names or TABLES:
        text = extract(name)
        path = _PACKAGE / "runtimes" / "tables" / f"{name}.json"
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{path.name}: {len(text) // 1024} KiB{'' if changed else ', unchanged'}")


if __name__ == "__main__":
    main()
