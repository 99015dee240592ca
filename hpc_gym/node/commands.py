"""What is really executed for a process of the plan, once ports and addresses are known."""

from __future__ import annotations

import os
from pathlib import Path

from hpc_gym.node import tree
from hpc_gym.node.context import NodeContext, host_name
from hpc_gym.node.engines import Place, entered
from hpc_gym.node.environment import process_environment, secrets_of
from hpc_gym.node.placeholders import Values
from hpc_gym.node.process import Command
from hpc_gym.plan.plan import Process


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
    for link in spec.links:
        path = Path(values.fill(link.path, python))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(values.fill(link.target, python))
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
    secrets = secrets_of(context.plan, spec.role, context.secrets.env)
    environment = process_environment(context.plan, os.environ, secrets, own)
    argv = tuple(values.fill(text, python) for text in spec.argv)
    if runtime is not None:
        argv, environment = entered(runtime, argv, environment, _place(context, spec))
    return Command(argv, environment, tuple(values.fds[name] for name in spec.listen))


def _place(context: NodeContext, spec: Process) -> Place:
    plan = context.plan
    training = plan.training
    files = [source.path for source in (*training.sources, *training.evaluation.sources)]
    files += [path for environment in plan.environments for path in environment.config_paths]
    files += [training.model]
    if plan.rollout.judge is not None and plan.rollout.judge.model is not None:
        files += [plan.rollout.judge.model]
    folders = [str(context.private_dir), os.environ.get("HF_HOME", ""), *(str(Path(file).parent) for file in files)]
    folders += [link.target for link in spec.links]
    visible = [each for each in dict.fromkeys(folders) if each.startswith("/") and Path(each).exists()]
    return Place(
        host=host_name(),
        component=context.node.component,
        heterogeneous=len(plan.launch.components) > 1,
        run_dir=str(context.run_dir),
        visible=visible,
    )
