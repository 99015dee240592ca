"""Jobs of small real programs on the real Slurm: what is under test is how a job lives and ends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import job_plans
import pytest
from cluster import Cluster, ClusterError
from job_plans import service, task

from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.submission import Request, submit_request
from hpc_gym.node.context import NodeContext, secrets_path
from hpc_gym.plan.plan import Launch, Plan, Process, Runtime
from hpc_gym.protocol.secrets import read_secrets

__all__ = ["FOREVER", "SlurmJob", "outcome_of", "resumed", "service", "submit", "task"]

FOREVER = "import time; print('here', flush=True); time.sleep(600)"


SUPERVISION = {"time_limit_margin_s": 30.0, "node_silent_s": 10.0}


@dataclass(frozen=True)
class Listener:
    """A port that others can connect to, and the program that holds it."""

    address: str
    port: int
    program: str


@dataclass
class SlurmJob:
    """A submitted job and the cluster it runs on."""

    job: HpcgymJob
    cluster: Cluster

    @property
    def id(self) -> str:
        return str(self.job.job_id)

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir

    def until(self, condition: Callable[[], Any], within_s: float = 90) -> Any:
        """What `condition` gives once that is true."""
        deadline = time.monotonic() + within_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {within_s} s\n{self.story()}"
            time.sleep(0.1)
        return value

    def story(self) -> str:
        """All that a person would look at."""
        try:
            queue = self.cluster.slurm("squeue", "-a", "-t", "all", "-o", "%i %T %M %R")
            queue += self.cluster.slurm("scontrol", "show", "job", self.id)
        except ClusterError as error:
            queue = f"{error}\n"
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

    def all_started(self, attempt: int = 1, within_s: float = 90) -> None:
        """Waits until every process of an attempt has started."""
        wanted = sum(len(node.processes) for node in self.plan.nodes)

        def ended() -> bool:
            return bool(self.events("outcome", attempt=attempt))

        self.until(lambda: len(self.events("started", attempt=attempt)) >= wanted or ended(), within_s)
        assert not ended(), self.story()

    @property
    def plan(self) -> Plan:
        return Plan.read(self.run_dir)

    def host(self, node: str, attempt: int = 1) -> str:
        """Host name of a node of the plan, as `train-0`."""
        return str(next(each for each in self.events("joined", attempt=attempt) if each["node"] == node)["host"])

    def address(self, node: str, attempt: int = 1) -> str:
        return str(next(each for each in self.events("joined", attempt=attempt) if each["node"] == node)["address"])

    def said(self, process: str, text: str, attempt: int = 1) -> None:
        """Waits until a process, as `train-0-rank-0`, has said something."""
        log = self.attempt(attempt) / "logs" / f"{process}.log"
        self.until(lambda: log.exists() and text in log.read_text())

    def listening(self, host: str) -> list[Listener]:
        """What listens on a host where other nodes reach it."""
        found = []
        for line in self.cluster.on(host, "ss", "-Htlnp").stdout.splitlines():
            fields = line.split()
            address, _, port = fields[3].rpartition(":")
            if not address.startswith(("127.", "[::1]", "[::ffff:127.")):
                found.append(Listener(address, int(port), fields[5].split('"')[1] if len(fields) > 5 else ""))
        return found

    def kill(self, node: str, process: str, attempt: int = 1) -> float:
        """Kills a process with SIGKILL and returns when."""
        return self.signal(node, process, "KILL", attempt)

    def signal(self, node: str, process: str, name: str, attempt: int = 1) -> float:
        """Sends a process a signal and returns when."""
        started = [each for each in self.events("started", process, attempt) if each["node"] == node]
        now = time.time()
        done = self.cluster.on(self.host(node, attempt), "kill", f"-{name}", str(started[-1]["pid"]))
        assert done.returncode == 0, done.stderr
        return now

    def freed(self, within_s: float = 90) -> float:
        """Waits until no node belongs to a job any more; returns when."""
        self.until(lambda: not self.cluster.slurm("squeue", "-h", "-o", "%i").strip(), within_s)
        return time.time()

    def figure(self, event: str, seconds: float, within: float) -> None:
        """Holds a measured time against its promise; with HPC_GYM_FIGURES=FILE also notes it there."""
        if path := os.environ.get("HPC_GYM_FIGURES"):
            figure = {"event": event, "seconds": seconds, "within": within, **asdict(self.cluster.settings())}
            with Path(path).open("a") as file:
                file.write(json.dumps(figure) + "\n")
        assert seconds < within, f"{event}: {seconds:.1f} s\n{self.story()}"

    def private_dirs(self, attempt: int = 1) -> dict[str, Path]:
        """The private directories of an attempt by node, as the machine sees them. A node that crashed in an earlier
        test may have others, which nobody could remove.
        """
        secrets = read_secrets(secrets_path(self.run_dir, attempt))
        found = {}
        for node in self.plan.nodes:
            name = NodeContext(self.plan, node, attempt, ("", 0), secrets, "", "").private_dir.name
            found[node.name] = self.cluster.tmp(self.host(node.name, attempt)) / name
        return found

    @property
    def patience(self) -> float:
        """Seconds after which a job has come back from whatever happened to a node."""
        # Slurm asks its nodes every third of the time-out, and has taken up to 1.7 times of it.
        return 120 + 2 * self.cluster.settings().slurmd_timeout

    def left(self) -> dict[str, list[str]]:
        """Processes on the nodes."""
        found = {node: list(self.cluster.processes(node).values()) for node in self.cluster.node_names}
        return {node: processes for node, processes in found.items() if processes}

    def output(self) -> str:
        return (self.run_dir / "submitit" / f"{self.id}_batch.out").read_text()


@pytest.fixture
def submit(slurm_cluster: Cluster, shared: Path) -> Iterator[Callable[..., SlurmJob]]:
    """Submits a job of one node per list of processes, or `rollout_nodes` of the first. `components`: a heterogeneous
    job, by role. `folder`: where its run directory is made.
    """
    jobs: list[SlurmJob] = []

    def make(
        *nodes: list[Process],
        components: tuple[Mapping[str, Any], ...] = (),
        options: Mapping[str, Any] | None = None,
        secrets: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        runtime: Runtime | None = None,
        setup: tuple[str, ...] = (),
        chain: int = 0,
        folder: Path | None = None,
        max_steps: int = 4,
        rollout_nodes: int = 1,
        **supervision: float,
    ) -> SlurmJob:
        rollout, train = (nodes[0], nodes[1:]) if nodes[0][0].role == "rollout" else ((), nodes)
        # A job whose limit is reached before Slurm has noticed that its first node is gone is not requeued.
        minutes = 5 + slurm_cluster.settings().slurmd_timeout // 30
        launch = Launch(
            kind="slurm", options={"time": minutes, **(options or {})}, components=components, setup=setup, chain=chain
        )
        plan = job_plans.plan(
            (folder or shared) / f"run-{len(jobs)}",
            rollout,
            train,
            launch,
            secrets=secrets,
            env=env or {},
            max_steps=max_steps,
            rollout_nodes=rollout_nodes,
        )
        separate = bool(components)
        plan = replace(
            plan,
            nodes=tuple(replace(node, component=int(separate and node.role == "train")) for node in plan.nodes),
            runtimes={"base": runtime} if runtime else plan.runtimes,
            supervision=replace(plan.supervision, **{**SUPERVISION, **supervision}),
        )
        jobs.append(SlurmJob(_submitted(plan), slurm_cluster))
        return jobs[-1]

    yield make


def outcome_of(run: SlurmJob, attempt: int = 1, within_s: float = 90) -> dict[str, Any]:
    """Waits until an attempt has ended; its last event."""
    return dict(run.until(lambda: run.events("outcome", attempt=attempt), within_s)[0])


def resumed(run: SlurmJob, what: str, since: float, within: float | None = None) -> set[str]:
    """Waits for a second life, which is to begin `within` seconds after `since` where that is promised, and for the
    job's good end; the hosts of that life.
    """
    stirred = time.monotonic()

    def has_begun() -> bool:
        nonlocal stirred
        if time.monotonic() - stirred > 15:
            run.cluster.stir()
            stirred = time.monotonic()
        return not run.attempt(1).samefile(run.attempt()) and bool(run.events("joined"))

    run.until(has_begun, run.patience)
    run.figure(f"{what}: running again", run.events("joined")[0]["time"] - since, within=within or run.patience)
    run.freed(run.patience)
    assert run.job.state == "COMPLETED", run.story()
    assert run.output().splitlines()[-1] == "COMPLETED"
    return {event["host"] for event in run.events("joined")}


def _submitted(plan: Plan) -> HpcgymJob:
    from submitit.core.utils import DelayedSubmission

    from hpc_gym.node.supervisor import supervise

    request = Request(plan=plan, experiment="small", resolved=lambda: "{}\n", cluster="test")
    return HpcgymJob.of(submit_request(request, DelayedSubmission(supervise, plan.run_dir).dump))
