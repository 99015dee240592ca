"""What the accounting allows a user: limits of the association and of the QOS, held against what a job asks for."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Sequence

from hpc_gym.config.slurm_gpus import gpus_per_node
from hpc_gym.errors import UserError
from hpc_gym.jobs.findings import Finding
from hpc_gym.jobs.slurm import ask
from hpc_gym.jobs.slurm_script import Directives
from hpc_gym.jobs.slurm_values import minutes as read_minutes

_FIELDS = ("MaxWall", "MaxTRES", "GrpTRES")
_QOS = "format=Name,MaxWall,MaxTRES,GrpTRES"
_ASSOCIATION = "format=Account,DefaultQOS,QOS,MaxWall,MaxTRES,GrpTRES"


def limit_findings(components: Sequence[Directives], times: Sequence[float]) -> Iterator[Finding]:
    """What is more than the user's limits. `times`: the time limit of each component, in minutes.

    Nothing is said where the accounting cannot be asked, or has no limits.
    """
    try:
        known = _rows(["sacctmgr", "-nP", "show", "qos", _QOS])
        own = _rows(["sacctmgr", "-nP", "show", "assoc", "where", f"user={getpass.getuser()}", _ASSOCIATION])
    except UserError:
        return
    qos = {name: dict(zip(_FIELDS, limits, strict=True)) for name, *limits in known}
    wanted = sorted({options.get("qos") or "" for options in components} - {""})
    for name in wanted:
        if name not in qos:
            yield Finding("qos", "failed", f"there is no QOS '{name}'; there are: {', '.join(sorted(qos))}")
    limits = {f"QOS '{name}'": qos[name] for name in wanted if name in qos}
    account = next((options["account"] for options in components if options.get("account")), None)
    for name, default, allowed, *values in own:
        if account not in (None, name):
            continue
        limits[f"account '{name}'"] = dict(zip(_FIELDS, values, strict=True))
        if not wanted and default in qos:
            limits[f"QOS '{default}'"] = qos[default]
        if refused := [each for each in wanted if each in qos and allowed and each not in allowed.split(",")]:
            detail = f"account '{name}' may not use QOS '{', '.join(refused)}'; it may use: {allowed}"
            yield Finding("qos", "warning", detail)
    beyond = [each for where, found in limits.items() for each in _beyond(where, found, components, times)]
    if beyond:
        yield Finding("limits", "failed", "; ".join(dict.fromkeys(beyond)))
    elif told := _told(limits):
        yield Finding("limits", "ok", told)


def _beyond(where: str, limits: dict[str, str], components: Sequence[Directives], times: Sequence[float]) -> list[str]:
    found = []
    if limits["MaxWall"] and max(times) > read_minutes(limits["MaxWall"]):
        found.append(f"{where} allows jobs of at most {limits['MaxWall']} (time)")
    nodes = [int(options["nodes"] or 0) for options in components]
    gpus = [(gpus_per_node(options) or 0) * count for options, count in zip(components, nodes, strict=True)]
    for field in ("MaxTRES", "GrpTRES"):
        # MaxTRES counts for each component of a heterogeneous job, GrpTRES for all that runs.
        together = max if field == "MaxTRES" else sum
        for name, wanted in (("node", together(nodes)), ("gres/gpu", together(gpus))):
            most = re.search(rf"(?:^|,){name}=(\d+)", limits[field])
            if most and wanted > int(most[1]):
                found.append(f"{where} allows at most {name}={most[1]} ({field}); this job asks for {wanted}")
    return found


def _told(limits: dict[str, dict[str, str]]) -> str:
    found = []
    for where, values in limits.items():
        if said := ", ".join(f"{name} {value}" for name, value in values.items() if value):
            found.append(f"{where}: {said}")
    return "; ".join(found)


def _rows(command: list[str]) -> list[list[str]]:
    return [line.split("|") for line in ask(command).splitlines() if line]
