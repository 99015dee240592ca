"""What is really executed for a process of the plan, once ports and addresses are known."""

from __future__ import annotations

import os
from pathlib import Path

from hpc_gym.node import tree
from hpc_gym.node.context import NodeContext
from hpc_gym.node.environment import process_environment
from hpc_gym.node.placeholders import Values
from hpc_gym.node.process import Command
from hpc_gym.plan.plan import Process, Runtime


def command(context: NodeContext, spec: Process, values: Values) -> Command:
    """The command of `spec`, after its files have been written.

    Raises KeyError for a port or endpoint that the plan does not declare, OSError when a file cannot be written.
    """
    runtime = context.plan.runtimes.get(spec.runtime)
    python = runtime.python if runtime else context.plan.python
    for file in spec.files:
        path = Path(values.fill(file.path, python))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values.fill(file.text, python))
    own = {name: values.fill(text, python) for name, text in spec.env.items()}
    own |= {
        "PYTHONPATH": str(context.run_dir / "code"),
        "TMPDIR": str(context.private_dir),
        "NOTIFY_SOCKET": str(context.private_dir / f"{spec.name}.notify"),
        "HPC_GYM_RUN_DIR": str(context.run_dir),
        "HPC_GYM_ATTEMPT": str(context.attempt),
        "HPC_GYM_NODE": context.node.name,
        tree.MARKER: context.process_marker(spec.name),
    }
    environment = process_environment(context.plan, os.environ, context.secrets.env, own)
    argv = tuple(values.fill(text, python) for text in spec.argv)
    if runtime is not None:
        argv, environment = _in_runtime(runtime, argv, environment)
    return Command(argv, environment, tuple(values.fds[name] for name in spec.listen))


def _in_runtime(runtime: Runtime, argv: tuple[str, ...], env: dict[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    folder = Path(runtime.root) / "bin"
    program = argv[0] if "/" in argv[0] or not (folder / argv[0]).exists() else str(folder / argv[0])
    return (program, *argv[1:]), {**env, "VIRTUAL_ENV": runtime.root, "PATH": f"{folder}{os.pathsep}{env['PATH']}"}
