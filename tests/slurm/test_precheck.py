"""What is asked of the nodes of a job before, or beside, anything heavy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster
from slurm_jobs import FOREVER, SlurmJob, service, task

from hpc_gym.protocol.attempt import Outcome

Submit = Callable[..., SlurmJob]


def test_the_nodes_of_a_sound_job_reach_one_another_within_seconds(submit: Submit) -> None:
    parts = ({"nodes": 1, "partition": "cpu"}, {"nodes": 3, "partition": "gpu"})
    run = submit(
        [service("server", FOREVER)], *([task(f"rank-{rank}", FOREVER)] for rank in range(3)), components=parts
    )
    run.all_started()
    reached = {
        event["node"]: event for event in run.until(lambda: len(run.events("reached")) == 4 and run.events("reached"))
    }
    hosts = [run.host(node.name) for node in run.plan.nodes]
    for rank, node in enumerate(run.plan.nodes):
        assert reached[node.name]["reached"] == [hosts[(rank + 1) % 4], hosts[(rank + 2) % 4]]
        assert reached[node.name]["unresolved"] == []
    slowest = max(event["seconds"] for event in (*reached.values(), *run.events("checked")))
    run.figure("checks of the nodes", slowest, within=20)
    # Their ports are closed again.
    run.until(lambda: not [each for each in run.listening(run.host("train-0")) if "slurm" not in each.program])


def test_a_node_that_does_not_reach_the_others_is_left_out(submit: Submit, slurm_cluster: Cluster) -> None:
    def route(action: str) -> None:
        for other in ("node2", "node4"):
            address = slurm_cluster.on(other, "hostname", "-I").stdout.split()[0]
            done = slurm_cluster.on("node3", "ip", "route", action, "unreachable", f"{address}/32")
            assert done.returncode == 0, done.stderr

    route("add")
    try:
        ranks = [[task(f"rank-{rank}", FOREVER)] for rank in range(3)]
        run = submit([service("server", FOREVER)], *ranks, options={"nodelist": "node[1-4]"})
        outcome = run.until(lambda: run.events("outcome", attempt=1), 60)[0]
        joined = max(event["time"] for event in run.events("joined", attempt=1))
        run.figure("a node without a way to the others: noticed", outcome["time"] - joined, within=30)
        (unfit,) = run.events("unfit", attempt=1)
        assert re.match(r"not fit for the job: .*node3.* on eth0: ", unfit["cause"])
        assert "without node3" in outcome["sentence"]
        run.until(lambda: "ExcNodeList=node3" in run.cluster.slurm("scontrol", "show", "job", run.id))
    finally:
        route("del")


def test_a_node_on_which_slurm_starts_nothing_is_left_out(submit: Submit, slurm_cluster: Cluster) -> None:
    slurm_cluster.kill_daemon("node2", "slurmd")
    run = submit([service("server", FOREVER)], *([task(f"rank-{rank}", FOREVER)] for rank in range(2)))
    run.all_started(attempt=2, within_s=run.patience)
    assert "node2" not in {run.host(node.name, attempt=2) for node in run.plan.nodes}
    first = Outcome.read(run.attempt(1))
    assert first is not None
    assert first.kind == "requeue"
    assert first.exclude == ("node2",)
    assert first.failure is not None
    assert "did not start" in first.failure.cause


def test_a_node_without_the_shared_storage_is_left_out(submit: Submit, slurm_cluster: Cluster, shared: Path) -> None:
    def hide(*command: str) -> None:
        done = slurm_cluster.on("node2", *command, str(shared))
        assert done.returncode == 0, done.stderr

    hide("mount", "-t", "tmpfs", "-o", "ro", "tmpfs")
    try:
        ranks = [[task(f"rank-{rank}", FOREVER)] for rank in range(2)]
        run = submit([service("server", FOREVER)], *ranks)
        outcome = run.until(lambda: run.events("outcome", attempt=1), 60)[0]
        began = run.events("began", attempt=1)[0]["time"]
        run.figure("a node without the shared storage: noticed", outcome["time"] - began, within=20)
        assert outcome["sentence"].startswith("TO BE REQUEUED")
        assert "node2: not fit for the job: " in outcome["sentence"]
        assert "submitit cannot be written to there" in outcome["sentence"]
        run.all_started(attempt=2)
        assert "node2" not in {run.host(node.name, attempt=2) for node in run.plan.nodes}
    finally:
        hide("umount")
