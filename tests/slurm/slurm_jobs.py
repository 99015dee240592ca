"""Jobs of small real programs on the real Slurm: what is under test is how a job lives and ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.submission import Request, submit_request
from hpc_gym.plan.plan import Evaluation, Launch, Node, Plan, Process, RolloutSettings, Sampling, Supervision, Training

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_output_tokens=8)
TRAINING = Training(
    method="grpo", model="none", grpo={}, deepspeed={}, prompts_per_step=1, world_size=2, max_staleness=0, sources=(),
    sampling=SAMPLING, evaluation=Evaluation((), False, False, 0, SAMPLING, 1), weight_transfer="gloo", wandb=None,
    checkpoint_every=0, checkpoints_kept=1, on_policy_tolerance=0.0,
)  # fmt: skip
SUPERVISION = Supervision(time_limit_margin_s=30.0, checkpoint_grace_s=5.0)

FOREVER = "import time; print('here', flush=True); time.sleep(600)"
STOPS_AT_A_CHECKPOINT = """
import signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))
print('here', flush=True)
while True: time.sleep(0.1)
"""


def task(name: str, code: str, **fields: Any) -> Process:
    return Process(name=name, role="train", kind="task", runtime="base", argv=("{python}", "-c", code), **fields)


def service(name: str, code: str, **fields: Any) -> Process:
    return Process(name=name, role="rollout", kind="service", runtime="base", argv=("{python}", "-c", code), **fields)


@dataclass
class SlurmJob:
    """A submitted job and the cluster it runs on."""

    job: HpcgymJob
    cluster: Cluster
    submitted: float

    @property
    def id(self) -> str:
        return str(self.job.job_id)

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir

    def until(self, condition: Callable[[], Any], within_s: float = 30) -> Any:
        """What `condition` gives once that is true."""
        deadline = time.monotonic() + within_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {within_s} s\n{self.story()}"
            time.sleep(0.1)
        return value

    def story(self) -> str:
        """All that a person would look at."""
        queue = self.cluster.slurm("squeue", "-a", "-t", "all", "-o", "%i %T %M %R")
        files = sorted(self.run_dir.glob("submitit/*_*.*")) + sorted(self.run_dir.glob("attempts/*/*.json*"))
        return queue + "\n".join(f"--- {file}\n{file.read_text()}" for file in files if file.suffix != ".pkl")

    def attempt(self, number: int | str = "latest") -> Path:
        return self.run_dir / "attempts" / str(number)

    def events(
        self, event: str = "", process: str | None = None, attempt: int | str = "latest"
    ) -> list[dict[str, Any]]:
        path = self.attempt(attempt) / "events.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [each for each in found if event in ("", each["event"]) and process in (None, each["process"])]

    def all_started(self, attempt: int = 1, within_s: float = 40) -> None:
        """Waits until every process of an attempt has started."""
        wanted = sum(len(node.processes) for node in self.plan.nodes)
        self.until(lambda: len(self.events("started", attempt=attempt)) >= wanted, within_s)

    @property
    def plan(self) -> Plan:
        return Plan.read(self.run_dir)

    def host(self, node: str, attempt: int = 1) -> str:
        """Host name of a node of the plan, as `train-0`."""
        return str(next(each for each in self.events("joined", attempt=attempt) if each["node"] == node)["host"])

    def kill(self, node: str, process: str, attempt: int = 1) -> float:
        """Kills a process with SIGKILL and returns when."""
        started = [each for each in self.events("started", process, attempt) if each["node"] == node]
        now = time.time()
        done = self.cluster.on(self.host(node, attempt), "kill", "-9", str(started[-1]["pid"]))
        assert done.returncode == 0, done.stderr
        return now

    def freed(self, within_s: float = 40) -> float:
        """Waits until no node belongs to a job any more; returns when."""
        self.until(lambda: not self.cluster.slurm("squeue", "-h", "-o", "%i").strip(), within_s)
        return time.time()

    def left(self) -> dict[str, list[str]]:
        """Processes on the nodes."""
        found = {node: list(self.cluster.processes(node).values()) for node in self.cluster.node_names}
        return {node: processes for node, processes in found.items() if processes}

    def output(self) -> str:
        return (self.run_dir / "submitit" / f"{self.id}_batch.out").read_text()


@pytest.fixture
def submit(slurm_cluster: Cluster, shared: Path) -> Iterator[Callable[..., SlurmJob]]:
    """Submits a job of one node per list of processes. `components`: a heterogeneous job, by role."""
    jobs: list[SlurmJob] = []

    def make(
        *nodes: list[Process],
        components: tuple[Mapping[str, Any], ...] = (),
        options: Mapping[str, Any] | None = None,
        secrets: tuple[str, ...] = (),
        **supervision: float,
    ) -> SlurmJob:
        name = f"run-{len(jobs)}"
        launch = Launch(kind="slurm", options={"time": 5, **(options or {})}, components=components)
        plan = Plan(
            name=name, run_dir=str(shared / name), seed=0, python=sys.executable, nodes=_nodes(nodes, bool(components)),
            runtimes={}, environments=(), rollout=RolloutSettings("policy", 64, 1, 1), training=TRAINING, launch=launch,
            supervision=replace(SUPERVISION, **supervision), secrets=secrets,
        )  # fmt: skip
        jobs.append(SlurmJob(_submitted(plan), slurm_cluster, time.time()))
        return jobs[-1]

    yield make


def _nodes(nodes: tuple[list[Process], ...], separate: bool) -> tuple[Node, ...]:
    made: list[Node] = []
    for rank, processes in enumerate(nodes):
        role = processes[0].role
        index = sum(each.role == role for each in made)
        made.append(Node(rank, role, index, int(separate and role == "train"), tuple(processes)))
    return tuple(made)


def _submitted(plan: Plan) -> HpcgymJob:
    from submitit.core.utils import DelayedSubmission

    from hpc_gym.node.supervisor import supervise

    request = Request(plan=plan, experiment="small", resolved=lambda: "{}\n", cluster="test")
    return HpcgymJob.of(submit_request(request, DelayedSubmission(supervise, plan.run_dir).dump))
