"""What Slurm itself says about a job before it is submitted."""

from __future__ import annotations

import getpass
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping

from hpc_gym.errors import UserError
from hpc_gym.jobs.check import Finding
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.slurm import ask
from hpc_gym.jobs.slurm_script import Directives, sbatch_options
from hpc_gym.plan.plan import Plan

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
_DOWN = ("down", "drain", "drng", "fail", "maint", "unk", "inval", "boot", "pow")
_GPUS = re.compile(r"(?:^|,)(?:gpu(?::[^:,=]+)?[:=])?(\d+)$")


def slurm_findings(plan: Plan) -> Iterator[Finding]:
    """The findings, from "is there a Slurm" to when the job would start."""
    if missing := [name for name in _COMMANDS if not shutil.which(name)]:
        yield Finding("slurm", "failed", f"not on PATH: {', '.join(missing)}. Go to a login node of the cluster.")
        return
    try:
        version = ask(["sinfo", "--version"]).split()[-1]
        yield Finding("slurm", "ok", f"version {version}")
        components = sbatch_options(plan)
        partitions = _partitions()
        for options in components:
            yield _partition(options, partitions)
        for account in sorted({options["account"] or "" for options in components if "account" in options}):
            yield _account(account)
        yield _time(plan, components[0], partitions)
        yield _fits(components, partitions)
        yield _test(plan)
        yield _cost(components, partitions)
    except UserError as error:
        yield Finding("slurm", "failed", str(error))


Partitions = Mapping[str, Mapping[str, str]]


def _partitions() -> Partitions:
    """The fields of every partition, by name; "" names the default one."""
    found: dict[str, Mapping[str, str]] = {}
    for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        fields = dict(field.partition("=")[::2] for field in line.split())
        found[fields["PartitionName"]] = fields
        if fields.get("Default") == "YES":
            found[""] = fields
    return found


def _names(options: Directives) -> list[str]:
    return (options.get("partition") or "").split(",")


def _partition(options: Directives, partitions: Partitions) -> Finding:
    for name in _names(options):
        if name not in partitions:
            known = ", ".join(sorted(filter(None, partitions)))
            what = (
                f"there is no partition '{name}'" if name else "no partition is given, and the cluster has no default"
            )
            return Finding("partition", "failed", f"{what}; there are: {known}")
        if partitions[name]["State"] != "UP":
            return Finding("partition", "failed", f"'{name}' is {partitions[name]['State']}")
    fields = partitions[_names(options)[0]]
    detail = f"{fields['PartitionName']}: {fields['TotalNodes']} nodes, at most {fields['MaxTime']}"
    return Finding("partition", "ok", detail)


def _account(account: str) -> Finding:
    try:
        listed = ask(["sacctmgr", "-nP", "show", "assoc", "where", f"user={getpass.getuser()}", "format=Account"])
    except UserError:
        return Finding("account", "warning", f"{account}: the accounting could not be asked")
    own = sorted({line for line in listed.splitlines() if line})
    if account in own:
        return Finding("account", "ok", account)
    enforced = (
        "associations" in ask(["scontrol", "show", "config"]).partition("AccountingStorageEnforce")[2].split("\n")[0]
    )
    detail = f"you have no account '{account}'; yours: {', '.join(own) or 'none'}"
    return Finding("account", "failed" if enforced else "warning", detail)


def _time(plan: Plan, options: Directives, partitions: Partitions) -> Finding:
    name = _names(options)[0]
    fields = partitions.get(name, {})
    wanted = options.get("time") or _set(fields.get("DefaultTime")) or fields.get("MaxTime", "UNLIMITED")
    limit, most = minutes(wanted), minutes(fields.get("MaxTime", "UNLIMITED"))
    margin = plan.supervision.time_limit_margin_s / 60
    if limit > most:
        return Finding("time limit", "failed", f"{wanted} is more than the partition allows: {fields['MaxTime']}")
    if limit <= 2 * margin:
        detail = f"{wanted}: the job saves and is requeued {margin:g} min before (supervision.time_limit_margin_s)"
        return Finding("time limit", "warning", detail)
    return Finding("time limit", "ok", f"{wanted}; saved and requeued {margin:g} min before it ends")


def _set(value: str | None) -> str | None:
    return None if value in (None, "NONE", "UNLIMITED") else value


def minutes(text: str) -> float:
    """Minutes of a time as sbatch takes it: 30, 30:00, 12:00:00, 2-0, 2-12:30, UNLIMITED (infinity)."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = text.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    if dash:
        hours, mins, secs = [*parts, 0.0, 0.0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, (mins, secs) = 0.0, [*parts, 0.0][:2]
    return float(days or 0) * 1440 + hours * 60 + mins + secs / 60


def _fits(components: list[Directives], partitions: Partitions) -> Finding:
    """Whether nodes enough exist for all components at once, which `sbatch --test-only` looks at one by one."""
    wanted = [int(options["nodes"] or 0) for options in components]
    eligible = [_eligible(options, partitions) for options in components]
    alone = len(components) == 1 or any("exclusive" in options or _gpus(options) for options in components)
    groups: list[tuple[int, ...]] = [(index,) for index in range(len(components))]
    if alone:
        groups = [
            group
            for size in range(1, len(components) + 1)
            for group in itertools.combinations(range(len(components)), size)
        ]
    for group in groups:
        nodes = set().union(*(eligible[index] for index in group))
        need = sum(wanted[index] for index in group)
        if need > len(nodes):
            what = "the job needs" if len(group) == len(components) else "one component needs"
            return Finding("size", "failed", f"{what} {need} nodes at once; {len(nodes)} that are up can serve it")
    return Finding("size", "ok", f"{sum(wanted)} nodes of {len(set().union(*eligible))} that are up")


def _eligible(options: Directives, partitions: Partitions) -> set[str]:
    """Nodes of the component's partitions that are not down, by name."""
    names = ",".join(partitions[name]["PartitionName"] for name in _names(options) if name in partitions)
    listed = ask(["sinfo", "-h", "-N", "-p", names, "-o", "%N %t"]).splitlines()
    return {name for name, state in map(str.split, listed) if not state.startswith(_DOWN) and not state.endswith("*")}


def _test(plan: Plan) -> Finding:
    """`sbatch --test-only` of the very script."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(render(plan))
        script.flush()
        try:
            told = ask(["sbatch", "--test-only", script.name], errors=True)
        except UserError as error:
            return Finding("sbatch", "failed", str(error).partition(" failed: ")[2] or str(error))
    start = re.findall(r"to start at (\S+)", told)
    return Finding("sbatch", "ok", f"accepted; expected start {max(start)}" if start else told.strip())


def _gpus(options: Directives) -> int:
    """GPUs per node that a component asks for."""
    for name in ("gpus-per-node", "gres", "gpus-per-task", "gpus"):
        if name in options and (found := _GPUS.search(options[name] or "")):
            count = int(found[1])
            return -(-count // int(options["nodes"] or 1)) if name == "gpus" else count
    return 0


def _cost(components: list[Directives], partitions: Partitions) -> Finding:
    hours = 0.0
    node_hours = 0.0
    for options in components:
        fields = partitions.get(_names(options)[0], {})
        limit = minutes(
            options.get("time") or components[0].get("time") or _set(fields.get("DefaultTime")) or "UNLIMITED"
        )
        node_hours += int(options["nodes"] or 0) * limit / 60
        hours += int(options["nodes"] or 0) * _gpus(options) * limit / 60
    if node_hours == float("inf"):
        return Finding("cost", "warning", "there is no time limit")
    return Finding("cost", "ok", f"{hours:g} GPU-hours, {node_hours:g} node-hours at the time limit")
