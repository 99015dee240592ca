"""Fills in what exists only once a job runs; the placeholders are listed in `hpc_gym.plan.plan`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from hpc_gym.plan.plan import Plan, Process

_PLAIN = "run_dir|attempt_dir|attempt|log_dir|secrets|node|address|interface|private_dir|python"
# `${address}` belongs to whoever reads the file (OmegaConf, shell), and JSON's braces never look like this.
_PLACEHOLDER = re.compile(
    rf"(?<!\$)\{{(?:(?P<plain>{_PLAIN})|(?P<kind>port|fd|endpoint|host|portof|endpoints):(?P<name>[\w.-]+)"
    r"(?:\+(?P<offset>\d+))?)\}"
)


@dataclass(frozen=True)
class Values:
    """What the placeholders of one node stand for. `endpoint(name)` gives `host:port`."""

    plain: Mapping[str, str]
    ports: Mapping[str, int]
    fds: Mapping[str, int]
    endpoint: Callable[[str], str]
    endpoint_names: tuple[str, ...]
    """Every endpoint that the plan declares, on any node."""

    def fill(self, text: str, python: str = "") -> str:
        """`text` with its placeholders replaced. Raises KeyError for a name that nobody declares."""
        return _PLACEHOLDER.sub(lambda match: self._value(match, python), text)

    def _value(self, match: re.Match[str], python: str) -> str:
        if plain := match["plain"]:
            return python if plain == "python" else self.plain[plain]
        kind, name, offset = match["kind"], match["name"], int(match["offset"] or 0)
        if kind == "port":
            return str(self.ports[name] + offset)
        if kind == "fd":
            return str(self.fds[name])
        if kind == "endpoints":
            return ",".join(self.endpoint(each) for each in numbered(name, self.endpoint_names))
        host, _, port = self.endpoint(name).rpartition(":")
        return {"endpoint": f"{host}:{port}", "host": host, "portof": port}[kind]


def numbered(prefix: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are `PREFIX-0`, `PREFIX-1`, ..., in the order of their numbers."""
    found = {int(name[len(prefix) + 1 :]): name for name in names if re.fullmatch(rf"{re.escape(prefix)}-\d+", name)}
    return [found[number] for number in sorted(found)]


def texts(process: Process) -> Iterator[str]:
    """Every text of a process that may hold placeholders."""
    yield from process.argv
    yield from process.env.values()
    for file in process.files:
        yield from (file.path, file.text)
    for link in process.links:
        yield from (link.path, link.target)
    if process.ready is not None:
        yield process.ready.target


def wanted_endpoints(process: Process, endpoint_names: Iterable[str]) -> set[str]:
    """Names of the endpoints whose address `process` needs before it can start. Raises KeyError for an undeclared
    one.
    """
    names = list(endpoint_names)
    wanted: set[str] = set()
    for text in texts(process):
        for match in _PLACEHOLDER.finditer(text):
            if match["kind"] == "endpoints":
                wanted.update(numbered(match["name"], names))
            elif match["kind"] in ("endpoint", "host", "portof"):
                if match["name"] not in names:
                    raise KeyError(match["name"])
                wanted.add(match["name"])
    return wanted


def declared_endpoints(plan: Plan) -> dict[str, int]:
    """Every endpoint of the plan and the rank of the node that publishes it (the lowest, where several nodes have
    one).
    """
    declared: dict[str, int] = {}
    for node in plan.nodes:
        for process in node.processes:
            for name in (*process.listen, *(port for port in process.ports if "*" not in port)):
                declared.setdefault(name, node.rank)
    return declared
