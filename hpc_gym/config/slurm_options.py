"""The long options of sbatch and srun that a cluster profile may set, and those that hpc-gym sets itself."""

from __future__ import annotations

import re
from typing import Any

from hpc_gym.config.problems import Problem, nearest, value_text
from hpc_gym.config.provenance import KeyPath

ROLES = ("rollout", "train", "judge", "environment")

# fmt: off
ALLOWED = frozenset({
    "account", "acctg-freq", "batch", "bb", "bbf", "begin", "cluster-constraint", "clusters", "comment",
    "constraint", "container", "container-id", "contiguous", "core-spec", "cores-per-socket", "cpu-freq",
    "cpus-per-gpu", "cpus-per-task", "deadline", "delay-boot", "dependency", "distribution", "exclude", "exclusive",
    "extra", "extra-node-info", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gpus-per-node",
    "gpus-per-socket", "gpus-per-task", "gres", "gres-flags", "hint", "hold", "licenses", "mail-type", "mail-user",
    "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "nodefile",
    "nodelist", "no-kill", "ntasks-per-core", "ntasks-per-socket", "oom-kill-step", "overcommit", "oversubscribe",
    "partition", "power", "prefer", "priority", "profile", "propagate", "qos", "quiet", "reservation", "resv-ports",
    "segment", "sockets-per-node", "spread-job", "stepmgr", "switches", "thread-spec", "threads-per-core", "time",
    "time-min", "tmp", "tres-bind", "tres-per-task", "uid", "use-min-nodes", "verbose",
    "wait-all-nodes", "wckey",
})
# fmt: on
"""From sbatch(1) of Slurm 24.11, without what `OWNED` holds and what submits another kind of job."""

OWNED = {
    "nodes": "hpc-gym counts them: set nodes.rollout and nodes.train",
    "ntasks": "hpc-gym starts one supervisor per node",
    "ntasks-per-node": "hpc-gym starts one supervisor per node",
    "ntasks-per-gpu": "hpc-gym starts one supervisor per node",
    **dict.fromkeys(
        ("gpus", "tres-per-job"),
        "Slurm may divide a total unevenly, and all nodes of a role need the same: set gpus-per-node",
    ),
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

# fmt: off
SRUN_ALLOWED = frozenset({
    "accel-bind", "acctg-freq", "bb", "bbf", "bcast", "bcast-exclude", "comment", "compress", "cpu-bind",
    "cpu-freq", "cpus-per-gpu", "cpus-per-task", "disable-status", "distribution", "epilog", "exact", "gpu-bind",
    "gpu-freq", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "gres", "gres-flags", "hint",
    "job-name", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mpi", "msg-timeout", "network", "nice",
    "ntasks-per-core", "profile", "prolog", "propagate", "quiet", "quit-on-interrupt", "resv-ports", "send-libs",
    "slurmd-debug", "task-epilog", "task-prolog", "threads", "threads-per-core", "tres-bind", "tres-per-task",
    "verbose", "wckey", "whole",
})
# fmt: on
"""From srun(1) of Slurm 24.11: of the one srun that starts a supervisor on every node."""

SRUN_OWNED = {
    "nodes": OWNED["nodes"],
    "ntasks": OWNED["ntasks"],
    "ntasks-per-node": OWNED["ntasks-per-node"],
    "gpus": OWNED["gpus"],
    "het-group": "hpc-gym starts one srun over all components",
    "overlap": "a supervisor starts nothing with srun that would have to wait for it",
    "export": OWNED["export"],
    "kill-on-bad-exit": "the coordinator decides how the job ends",
    "wait": "the coordinator decides how the job ends",
    "output": OWNED["output"],
    "error": OWNED["error"],
    "input": OWNED["input"],
    "label": "logs go into the run directory",
    "unbuffered": "logs go into the run directory",
    "chdir": OWNED["chdir"],
    "container-image": "set cluster.runtime",
    "container-mounts": "set cluster.runtime",
}


_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite", re.IGNORECASE)
"""A time as sbatch(1) has it."""

_TEXT = frozenset({"account", "constraint", "partition", "qos", "reservation", "wckey"})
"""Options whose value is a name. YAML reads some names as numbers (0123 is 83, 2024_11_05 is 20241105) or as true and
false, and Slurm would be asked for another one, or for none.
"""


def slurm_problems(tree: dict[str, Any]) -> list[Problem]:
    """Unknown options, and those that hpc-gym owns, in `cluster.slurm` and `cluster.srun` of a composed experiment."""
    cluster = tree.get("cluster")
    if not isinstance(cluster, dict):
        return []
    problems = []
    for name in _section(cluster, "srun"):
        if found := _srun_problem(name):
            problems.append(found)
    for name, value in _section(cluster, "slurm").items():
        path: KeyPath = ("cluster", "slurm", name)
        if name in ROLES:
            inner = value if isinstance(value, dict) else {}
            problems += [found for key, each in inner.items() if (found := _problem((*path, key), key, each, ()))]
        elif found := _problem(path, name, value, ROLES):
            problems.append(found)
    return problems


def _section(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    section = cluster.get(name)
    return section if isinstance(section, dict) else {}


def _srun_problem(name: str) -> Problem | None:
    path: KeyPath = ("cluster", "srun", name)
    option = name.replace("_", "-")
    if option in SRUN_OWNED:
        return Problem(path, f"hpc-gym owns this option of srun: {SRUN_OWNED[option]}.")
    if option not in SRUN_ALLOWED:
        return Problem(path, f"srun has no such option, or none for a step of a job; {nearest(option, SRUN_ALLOWED)}")
    return None


def _problem(path: KeyPath, name: str, value: Any, sections: tuple[str, ...]) -> Problem | None:
    option = name.replace("_", "-")
    if option in OWNED:
        return Problem(path, f"hpc-gym owns this directive: {OWNED[option]}.")
    if option not in ALLOWED:
        return Problem(path, f"sbatch has no such option; {nearest(option, ALLOWED | set(sections))}")
    if option in _TEXT and isinstance(value, int | float):
        return Problem(path, f"must be text, but YAML reads this as {value_text(value)}: write it in quotes.")
    if option in ("time", "time-min") and isinstance(value, str | int | float) and not _TIME.fullmatch(str(value)):
        allowed = "minutes, or as 12:00:00 or 2-00:00:00 (days-hours:minutes:seconds)"
        return Problem(path, f"{value_text(value)} is no time as sbatch takes it; allowed: {allowed}.")
    return None
