"""Jobs of small real programs under real supervisors: what is under test is the supervision."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import hpc_gym
from hpc_gym.node import tree
from hpc_gym.node.context import job_marker, secrets_path
from hpc_gym.plan.plan import (
    Evaluation,
    Launch,
    Node,
    Plan,
    Process,
    RolloutSettings,
    Sampling,
    Supervision,
    Training,
)
from hpc_gym.protocol.attempt import Failure, Outcome
from hpc_gym.protocol.secrets import read_secrets

SUPERVISION = Supervision(
    heartbeat_s=0.3, node_silent_s=3.0, stop_within_s=10.0, checkpoint_grace_s=5.0, time_limit_margin_s=15.0
)


def python(code: str) -> tuple[str, ...]:
    """argv of a Python program."""
    return ("{python}", "-c", code)


def task(name: str, code: str, **fields: Any) -> Process:
    return Process(name=name, role="train", kind="task", runtime="base", argv=python(code), **fields)


def service(name: str, code: str, **fields: Any) -> Process:
    return Process(name=name, role="rollout", kind="service", runtime="base", argv=python(code), **fields)


FOREVER = "import time; print('here'); time.sleep(600)"


@dataclass
class Job:
    """A job of simulated nodes, started as the local job script starts it."""

    plan: Plan
    temporary: Path
    """Node-local scratch of the job."""
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    output: str = ""

    @property
    def run_dir(self) -> Path:
        return Path(self.plan.run_dir)

    @property
    def attempt_dir(self) -> Path:
        return self.run_dir / "attempts" / "latest"

    def start(self, env: dict[str, str] | None = None) -> Job:
        script = (
            "set -eu\n"
            f'exports="$({shlex.quote(sys.executable)} -m hpc_gym.node.attempt {shlex.quote(self.plan.run_dir)})"\n'
            'eval "$exports"\n'
            f"exec {shlex.quote(sys.executable)} -m hpc_gym.node.local_nodes {shlex.quote(self.plan.run_dir)}\n"
        )
        code = str(Path(hpc_gym.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": code, **(env or {})}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.process = subprocess.Popen(
            ["bash", "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started = time.monotonic()
        return self

    def wait(self, within_s: float = 40) -> int:
        """The exit code of the job."""
        assert self.process is not None
        self.output, _ = self.process.communicate(timeout=within_s)
        return self.process.returncode

    def events(self, event: str = "", process: str | None = None) -> list[dict[str, Any]]:
        path = self.attempt_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            found
            for found in map(json.loads, lines)
            if (not event or found["event"] == event) and (process is None or found["process"] == process)
        ]

    def until(self, condition: Callable[[], Any], within_s: float = 20) -> Any:
        """What `condition` gives once that is true."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if value := condition():
                return value
            assert self.process is None or self.process.poll() is None or condition(), self.process.communicate()[0]
            time.sleep(0.03)
        raise AssertionError(f"did not happen within {within_s} s; events: {self.events()}")

    def pid(self, process: str, node: str = "", life: int = 0) -> int:
        """pid of a process, once its life number `life` has started."""

        def started() -> list[dict[str, Any]]:
            return [each for each in self.events("started", process) if node in ("", each["node"])]

        return int(self.until(lambda: len(started()) > life and started())[life]["pid"])

    def supervisor(self, rank: int) -> int:
        """pid of a node's supervisor."""
        name = self.plan.nodes[rank].name
        joined = self.until(lambda: [each for each in self.events("joined") if each["node"] == name])
        return int(joined[0]["pid"])

    def guardian(self, rank: int) -> int:
        """pid of the task that stands above a node's supervisor."""
        proc = tree.process(self.supervisor(rank))
        assert proc is not None
        return proc.parent

    def outcome(self) -> Outcome:
        found = Outcome.read(self.attempt_dir)
        assert found is not None
        return found

    def failure(self) -> Failure:
        return Failure(**json.loads((self.run_dir / "failure.json").read_text()))

    def log(self, name: str) -> str:
        return (self.attempt_dir / "logs" / name).read_text()

    def marker(self) -> str:
        attempt = int((self.run_dir / "attempts" / "latest").readlink().name)
        return job_marker(read_secrets(secrets_path(self.run_dir, attempt)))

    def marker_if_known(self) -> str:
        # It may be half written.
        with contextlib.suppress(OSError, ValueError):
            return self.marker()
        return ""

    def log_if_there(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return self.log(name)
        return ""

    def alive(self, marker: str) -> list[tree.Proc]:
        """Every process that has the attempt's marker in its environment."""
        return tree.marked(marker, tree.processes())

    def orphans(self, marker: str, process: str) -> list[tree.Proc]:
        """Processes of `process` that have left its session."""
        found = []
        for proc in self.alive(marker):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{proc.pid}/environ").read_bytes().split(b"\0")
                leader = self.pid(process)
                mine = any(
                    entry.startswith(b"HPC_GYM_PROCESS=") and entry.endswith(f" {process}".encode())
                    for entry in environment
                )
                if mine and proc.session != leader and tree.process(proc.parent) and proc.parent != leader:
                    found.append(proc)
        return found

    def shared_memory(self) -> list[str]:
        """The shared memory that the job's programs said they made, as long as it is there."""
        logs = "".join(path.read_text() for path in self.run_dir.glob("attempts/*/logs/*.log"))
        return [name for name in re.findall(r"block (\S+)", logs) if Path("/dev/shm", name).exists()]

    def left(self, marker: str) -> list[str]:
        """What of the job is still there: processes, shared memory, private directories."""
        alive = [f"pid {proc.pid}" for proc in self.alive(marker)]
        shared = [f"/dev/shm/{name}" for name in self.shared_memory()]
        return alive + shared + [str(path) for path in self.temporary.iterdir()]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes a job of one node per list of processes; ends whatever is left of it."""
    jobs: list[Job] = []

    def make(*nodes: list[Process], **supervision: float) -> Job:
        run_dir = tmp_path / f"run-{len(jobs)}"
        run_dir.mkdir()
        (run_dir / "code").symlink_to(Path(hpc_gym.__file__).parent.parent)
        # Unix sockets have short paths.
        scratch = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        plan = make_plan(run_dir, nodes, replace(SUPERVISION, **supervision), str(scratch))
        (run_dir / "plan.json").write_text(plan.to_json())
        jobs.append(Job(plan, scratch))
        return jobs[-1]

    yield make
    for each in jobs:
        if each.process is not None and each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGTERM)
            each.wait(30)
        shutil.rmtree(each.temporary, ignore_errors=True)


def ended_within(job: Job, since: float, seconds: float) -> bool:
    """Whether every node said that it is free within `seconds` of the moment `since`, and the job's end followed at
    once.
    """
    released = [event["time"] for event in job.events("released")]
    return (
        len(released) == len(job.plan.nodes) and max(released) - since < seconds and time.time() - since < seconds + 2
    )


def make_plan(
    run_dir: Path, nodes: tuple[list[Process], ...], supervision: Supervision = SUPERVISION, scratch: str | None = None
) -> Plan:
    made = []
    for rank, processes in enumerate(nodes):
        role = processes[0].role
        index = sum(1 for each in made if each.role == role)
        made.append(Node(rank=rank, role=role, index=index, component=0, processes=tuple(processes)))
    sampling = Sampling(temperature=1.0, top_p=1.0, max_output_tokens=8)
    return Plan(
        name="test",
        run_dir=str(run_dir),
        seed=0,
        python=sys.executable,
        nodes=tuple(made),
        runtimes={},
        environments=(),
        rollout=RolloutSettings(model_name="policy", max_model_len=64, max_concurrent=1, replicas=1),
        training=training(sampling),
        launch=Launch(kind="local", scratch=scratch),
        supervision=supervision,
    )


def training(sampling: Sampling) -> Training:
    from dataclasses import MISSING, fields

    values: dict[str, Any] = {
        "method": "grpo",
        "model": "none",
        "grpo": {},
        "deepspeed": {},
        "sources": (),
        "sampling": sampling,
        "weight_transfer": "gloo",
        "wandb": None,
        "evaluation": Evaluation(
            **{"sources": (), "at_start": False, "at_end": False, "every": 0, "sampling": sampling, "num_rollouts": 1}
        ),
    }
    # What training needs has no meaning for a supervisor.
    for each in fields(Training):
        if each.name not in values and each.default is MISSING and each.default_factory is MISSING:
            values[each.name] = 0
    return Training(**values)
