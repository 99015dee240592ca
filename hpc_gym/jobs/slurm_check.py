"""What Slurm itself says about a job before it is submitted."""

from __future__ import annotations

import getpass
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping

from hpc_gym.config.slurm_gpus import gpu_option, gpus_per_node
from hpc_gym.errors import UserError
from hpc_gym.jobs.findings import Finding
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.slurm import ask, sbatch
from hpc_gym.jobs.slurm_limits import limit_findings
from hpc_gym.jobs.slurm_script import Directives, sbatch_options
from hpc_gym.jobs.slurm_values import minutes
from hpc_gym.plan.plan import Plan

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
_DOWN = ("down", "drain", "drng", "fail", "maint", "unk", "inval", "boot", "pow")


def slurm_findings(plan: Plan) -> Iterator[Finding]:
    """The findings, from "is there a Slurm" to when the job would start."""
    if missing := [name for name in _COMMANDS if not shutil.which(name)]:
        yield Finding("slurm", "failed", f"not on PATH: {', '.join(missing)}. Go to a login node of the cluster.")
        return
    try:
        version = ask(["sinfo", "--version"]).split()[-1]
    except UserError as error:
        why = str(error).splitlines()[-1].partition(": ")[2]
        yield Finding("slurm", "failed", f"no cluster answers ({why}). Go to a login node of the cluster.")
        return
    yield Finding("slurm", "ok", f"version {version}")
    try:
        components = sbatch_options(plan)
        partitions = _partitions()
        for options in components:
            yield _partition(options, partitions)
        for account in sorted({options["account"] or "" for options in components if "account" in options}):
            yield _account(account)
        yield from limit_findings(components, [_limit(options, components, partitions) for options in components])
        yield from _times(plan, components, partitions)
        yield _fits(components, partitions)
        yield _test(plan)
        yield _cost(components, partitions)
        yield from _others(components, partitions)
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
    most = fields.get("MaxNodes", "UNLIMITED")
    if most.isdigit() and int(options["nodes"] or 0) > int(most):
        detail = f"'{fields['PartitionName']}' gives a job at most {most} nodes; this one asks for {options['nodes']}"
        return Finding("partition", "failed", detail)
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


def _times(plan: Plan, components: list[Directives], partitions: Partitions) -> Iterator[Finding]:
    """One finding per limit: the components of a heterogeneous job mostly have the same."""
    yield from dict.fromkeys(_time(plan, options, components, partitions) for options in components)


def _time(plan: Plan, options: Directives, components: list[Directives], partitions: Partitions) -> Finding:
    fields = partitions.get(_names(options)[0], {})
    wanted = _time_text(options, components, fields)
    limit, most = minutes(wanted), minutes(fields.get("MaxTime", "UNLIMITED"))
    wanted += " min" if wanted.isdigit() else ""
    margin = plan.supervision.time_limit_margin_s / 60
    if limit > most:
        where = f"partition '{fields['PartitionName']}'"
        return Finding("time limit", "failed", f"{wanted} is more than {where} allows: {fields['MaxTime']}")
    if limit <= 2 * margin:
        detail = f"{wanted}: the job saves and is requeued {margin:g} min before (supervision.time_limit_margin_s)"
        return Finding("time limit", "warning", detail)
    return Finding("time limit", "ok", f"{wanted}; saved and requeued {margin:g} min before it ends")


def _limit(options: Directives, components: list[Directives], partitions: Partitions) -> float:
    """Minutes that a component may take."""
    return minutes(_time_text(options, components, partitions.get(_names(options)[0], {})))


def _time_text(options: Directives, components: list[Directives], fields: Mapping[str, str]) -> str:
    own = options.get("time") or components[0].get("time")
    return own or _set(fields.get("DefaultTime")) or fields.get("MaxTime", "UNLIMITED")


def _set(value: str | None) -> str | None:
    return None if value in (None, "NONE", "UNLIMITED") else value


def _fits(components: list[Directives], partitions: Partitions) -> Finding:
    """Whether nodes enough exist for all components at once, which `sbatch --test-only` looks at one by one."""
    wanted = [int(options["nodes"] or 0) for options in components]
    eligible = [_eligible(options, partitions) for options in components]
    alone = len(components) == 1 or any("exclusive" in options or gpu_option(options) for options in components)
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
    """Nodes of the component's partitions, by name, that are not down and have the GPUs and features it asks for."""
    names = ",".join(partitions[name]["PartitionName"] for name in _names(options) if name in partitions)
    gpus, wanted = gpus_per_node(options) or 0, _features(options.get("constraint"))
    found = set()
    for line in ask(["sinfo", "-h", "-N", "-p", names, "-o", "%N|%t|%G|%f"]).splitlines():
        name, state, gres, features = line.split("|")
        is_up = not state.startswith(_DOWN) and not state.endswith("*")
        if is_up and _gpus_of_node(gres) >= gpus and wanted <= set(features.split(",")):
            found.add(name)
    return found


def _gpus_of_node(gres: str) -> int:
    """GPUs in what sinfo says of a node, as `gpu:h100:8(S:0-1),craynetwork:4`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def _features(constraint: str | None) -> set[str]:
    """Features that every node must have; of a constraint with more than `&`, none: sbatch is asked about that."""
    return set(constraint.split("&")) if constraint and re.fullmatch(r"[\w.-]+(&[\w.-]+)*", constraint) else set()


def _test(plan: Plan) -> Finding:
    """`sbatch --test-only` of the very script."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(render(plan))
        script.flush()
        try:
            told = sbatch("--test-only", script.name, errors=True)
        except UserError as error:
            return Finding("sbatch", "failed", str(error).partition(" failed: ")[2] or str(error))
    start = re.findall(r"to start at (\S+)", told)
    return Finding("sbatch", "ok", f"accepted; expected start {max(start)}" if start else told.strip())


def _cost(components: list[Directives], partitions: Partitions) -> Finding:
    hours = 0.0
    node_hours = 0.0
    for options in components:
        limit = _limit(options, components, partitions)
        node_hours += int(options["nodes"] or 0) * limit / 60
        hours += int(options["nodes"] or 0) * (gpus_per_node(options) or 0) * limit / 60
    if node_hours == float("inf"):
        return Finding("cost", "warning", "there is no time limit")
    return Finding("cost", "ok", f"{hours:.4g} GPU-hours, {node_hours:.3g} node-hours at the time limit")


def _others(components: list[Directives], partitions: Partitions) -> Iterator[Finding]:
    """Whether jobs of other users may run on the same nodes."""
    shared = []
    for options in components:
        fields = partitions.get(_names(options)[0], {})
        if fields and "exclusive" not in options and fields.get("OverSubscribe") != "EXCLUSIVE":
            shared.append(fields["PartitionName"])
    if shared:
        where = " and ".join(dict.fromkeys(shared))
        detail = (
            f"other users' jobs may run on the nodes of {where} that this job gets: they would reach NeMo Gym's "
            "servers, on loopback and without authentication. Set cluster.slurm.exclusive: true where that matters."
        )
        yield Finding("node sharing", "warning", detail)
