"""The long options of sbatch that a cluster profile may set, and those that hpc-gym sets itself."""

from __future__ import annotations

from typing import Any

from hpc_gym.config.problems import Problem, nearest
from hpc_gym.config.provenance import KeyPath

ROLES = ("rollout", "train", "judge", "environment")

# fmt: off
ALLOWED = frozenset({
    "account", "acctg-freq", "batch", "bb", "bbf", "begin", "cluster-constraint", "clusters", "comment",
    "constraint", "container", "container-id", "contiguous", "core-spec", "cores-per-socket", "cpu-freq",
    "cpus-per-gpu", "cpus-per-task", "deadline", "delay-boot", "dependency", "distribution", "exclude", "exclusive",
    "extra", "extra-node-info", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gpus", "gpus-per-node",
    "gpus-per-socket", "gpus-per-task", "gres", "gres-flags", "hint", "hold", "licenses", "mail-type", "mail-user",
    "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "nodefile",
    "nodelist", "no-kill", "ntasks-per-core", "ntasks-per-socket", "oom-kill-step", "overcommit", "oversubscribe",
    "partition", "power", "prefer", "priority", "profile", "propagate", "qos", "quiet", "reservation", "resv-ports",
    "segment", "sockets-per-node", "spread-job", "stepmgr", "switches", "thread-spec", "threads-per-core", "time",
    "time-min", "tmp", "tres-bind", "tres-per-job", "tres-per-task", "uid", "use-min-nodes", "verbose",
    "wait-all-nodes", "wckey",
})
# fmt: on
"""From sbatch(1) of Slurm 24.11, without what `OWNED` holds and what submits another kind of job."""

OWNED = {
    "nodes": "hpc-gym counts them: set nodes.rollout and nodes.train",
    "ntasks": "hpc-gym starts one supervisor per node",
    "ntasks-per-node": "hpc-gym starts one supervisor per node",
    "ntasks-per-gpu": "hpc-gym starts one supervisor per node",
    "job-name": "the job is called like the experiment: set name",
    "output": "logs go into the run directory",
    "error": "logs go into the run directory",
    "input": "a job reads nothing from a terminal",
    "open-mode": "logs go into the run directory, per attempt",
    "signal": "hpc-gym asks for it: set supervision.time_limit_margin_s",
    "requeue": "hpc-gym requeues when it can resume",
    "no-requeue": "hpc-gym requeues when it can resume",
    "chdir": "the job runs in its run directory",
    "export": "set cluster.env and secrets",
    "export-file": "set cluster.env and secrets",
    "array": "one job is one run",
    "wrap": "the job script is hpc-gym's",
    "parsable": "hpc-gym reads what sbatch prints",
    "wait": "use `hpc-gym submit --follow`",
    "test-only": "use `hpc-gym submit --dry-run`",
    "ignore-pbs": "the job script is hpc-gym's",
}


def slurm_problems(tree: dict[str, Any]) -> list[Problem]:
    """Unknown directives, and those that hpc-gym owns, in `cluster.slurm` of a composed experiment."""
    cluster = tree.get("cluster")
    slurm = cluster.get("slurm") if isinstance(cluster, dict) else None
    if not isinstance(slurm, dict):
        return []
    problems = []
    for name, value in slurm.items():
        path: KeyPath = ("cluster", "slurm", name)
        if name in ROLES:
            inner = value if isinstance(value, dict) else {}
            problems += [found for key in inner if (found := _problem((*path, key), key, ()))]
        elif found := _problem(path, name, ROLES):
            problems.append(found)
    return problems


def _problem(path: KeyPath, name: str, sections: tuple[str, ...]) -> Problem | None:
    option = name.replace("_", "-")
    if option in OWNED:
        return Problem(path, f"hpc-gym owns this directive: {OWNED[option]}.")
    if option not in ALLOWED:
        return Problem(path, f"sbatch has no such option; {nearest(option, ALLOWED | set(sections))}")
    return None
