"""Gives nodes that are lost back to Slurm before the job is queued again.

A job that is requeued with a silent node in it waits until Slurm gives that node up: with SlurmdTimeout=300, the
default, 300 to 500 s, as Slurm asks its nodes every 100 s. What Slurm 22.05 then starts has kept the account of GPUs
of the life before (`kill_running_job_by_node_name` calls `cleanup_completing`, not `batch_requeue_fini`): it refuses
to make a step of it ("Invalid generic resource"), and counts those GPUs as used until slurmctld is restarted. A job
that has let go of the node is spared all of it: it waits `cred_expire` seconds only. Of the first component of a
heterogeneous job nothing can be given back: scontrol takes its id for that of several jobs, and "ID+0" for none.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hpc_gym.node import scontrol

_RESTORED_WITHIN_S = 5.0
_ASK_AGAIN_S = 0.2


@dataclass(frozen=True)
class Component:
    """A component of a heterogeneous job, or the whole of a plain one, as Slurm keeps it."""

    job_id: str
    hosts: tuple[str, ...]
    """Slurm's names of its nodes."""
    required: str = ""
    """Nodes that it was submitted for (`--nodelist`), in Slurm's spelling."""


def components(environment: Mapping[str, str]) -> list[Component]:
    """What the job of this process consists of, in order. `environment`: of the job script."""
    count = int(environment.get("SLURM_HET_SIZE") or 0)
    found = []
    for suffix in [f"_HET_GROUP_{index}" for index in range(count)] or [""]:
        nodes = scontrol.hostnames(environment.get(f"SLURM_JOB_NODELIST{suffix}", ""))
        found.append(Component(environment.get(f"SLURM_JOB_ID{suffix}", ""), tuple(nodes)))
    return found


def without(component: Component, lost: Collection[str]) -> Component | None:
    """The component without these hosts; None where it has none of them, or would have nothing left."""
    short = {host.partition(".")[0] for host in lost}
    left = tuple(host for host in component.hosts if host.partition(".")[0] not in short)
    return replace(component, hosts=left) if 0 < len(left) < len(component.hosts) else None


def let_go(parts: Sequence[Component], lost: Collection[str]) -> list[Component]:
    """Gives the hosts in `lost` back to Slurm; what the job consists of afterwards. Where Slurm refuses (a site may,
    with `disable_job_shrink`), or has begun to queue the job again by itself, the job waits as it always did.
    """
    return [_shrunk(each, smaller) if (smaller := without(each, lost)) else each for each in parts]


def _shrunk(component: Component, smaller: Component) -> Component:
    told = scontrol.fields(component.job_id)
    if told.get("JobState") != "RUNNING":
        return component  # of a job that waits, the same command would say which nodes it must have
    refusal = scontrol.update(component.job_id, {"NodeList": ",".join(smaller.hosts)})
    if refusal:
        print(f"Slurm does not take back the lost nodes of job {component.job_id} yet: {refusal}", flush=True)
        return component
    return replace(smaller, required=_required(told))


def restore(parts: Sequence[Component], wanted: Sequence[int]) -> None:
    """Lets a job that is queued again ask for as many nodes per component as it was submitted with."""
    deadline = time.monotonic() + _RESTORED_WITHIN_S
    for part, nodes in zip(parts, wanted, strict=True):
        if len(part.hosts) >= nodes:
            continue
        change = {"NumNodes": str(nodes), "NumTasks": str(nodes)}
        if _required(scontrol.fields(part.job_id)) != part.required:
            change["NodeList"] = part.required  # Slurm queued the job again just before it was told which to keep
        while refusal := scontrol.update(part.job_id, change):
            if time.monotonic() > deadline:
                print(f"job {part.job_id} is queued again, but not for {nodes} nodes: {refusal}", flush=True)
                break
            time.sleep(_ASK_AGAIN_S)


def _required(told: Mapping[str, str]) -> str:
    found = told.get("ReqNodeList", "")
    return "" if found == "(null)" else found
