"""What a supervisor knows of the attempt, its node and its place: read once from the environment, then only passed
on.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Node, Plan
from hpc_gym.protocol.log_lines import log_name
from hpc_gym.protocol.secrets import Secrets, read_secrets

NODE_TOKEN = "token"
"""File in the private directory: a secret of this node and attempt, for programs that want a token of their own."""
LONGEST_SCRATCH = 24
"""Bytes of the path that the private directory may be made in; a longer one in a profile is refused (config.schema)."""


@dataclass(frozen=True)
class NodeContext:
    """One node of one attempt."""

    plan: Plan
    node: Node
    attempt: int
    coordinator: tuple[str, int]
    """Address and port."""
    secrets: Secrets
    address: str
    interface: str
    hosts: tuple[str, ...] = ()
    """Host names of all nodes in rank order, as Slurm gave them to the job; empty elsewhere."""

    @classmethod
    def from_environment(cls, run_dir: Path, environment: Mapping[str, str] = os.environ) -> NodeContext:
        """Raises UserError where what `hpc_gym.node.attempt` exports is missing."""
        plan = Plan.read(run_dir)
        rank = environment.get("HPC_GYM_NODE_RANK") or environment.get("SLURM_PROCID")
        try:
            attempt = int(environment["HPC_GYM_ATTEMPT"])
            host, _, port = environment["HPC_GYM_COORDINATOR"].rpartition(":")
            node = plan.nodes[int(rank or "")]
        except (KeyError, ValueError, IndexError):
            raise UserError(
                "a supervisor needs HPC_GYM_ATTEMPT and HPC_GYM_COORDINATOR, which the job script takes from `python -m"
                f" hpc_gym.node.attempt`, and a node rank below {len(plan.nodes)} in HPC_GYM_NODE_RANK or SLURM_PROCID;"
                f" the rank here is {rank!r}"
            ) from None
        address, interface = node_address(plan, host)
        secrets = read_secrets(secrets_path(run_dir, attempt))
        hosts = tuple(environment.get("HPC_GYM_HOSTS", "").split(",")) if environment.get("HPC_GYM_HOSTS") else ()
        return cls(plan, node, attempt, (host, int(port)), secrets, address, interface, hosts)

    @property
    def run_dir(self) -> Path:
        return Path(self.plan.run_dir)

    @property
    def attempt_dir(self) -> Path:
        return self.run_dir / "attempts" / str(self.attempt)

    @property
    def marker(self) -> str:
        """What stands in the environment of every process of this node and attempt."""
        return f"{job_marker(self.secrets)} {self.node.name}"

    def process_marker(self, process: str) -> str:
        return f"{self.marker} {process}"

    @property
    def private_dir(self) -> Path:
        """A directory of this node and attempt, on the node. Nobody can guess its name, so nobody can be there before
        us; all who may have to clean up know it. The path is short enough for Unix sockets (108 bytes) deep inside it
        (Ray's).
        """
        scratch = self.plan.launch.scratch or tempfile.gettempdir()
        if len(os.fsencode(scratch)) > LONGEST_SCRATCH or not os.access(scratch, os.W_OK | os.X_OK):
            scratch = "/tmp"
        return Path(scratch) / f"hg-{_digest(self.secrets, f'directory of {self.node.name}')[:10]}"

    def make_private_dir(self) -> None:
        """Makes the private directory, with the node's own token in it. Raises FileExistsError when it is there."""
        self.private_dir.mkdir(mode=0o700)
        descriptor = os.open(self.private_dir / NODE_TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_digest(self.secrets, f"token of {self.node.name}"))

    def log(self, role: str, process: str) -> Path:
        return self.attempt_dir / "logs" / log_name(role, self.node.name, process)

    def plain_values(self) -> dict[str, str]:
        """The placeholders without a name."""
        return {
            "run_dir": str(self.run_dir),
            "attempt": str(self.attempt),
            "attempt_dir": str(self.attempt_dir),
            "log_dir": str(self.attempt_dir / "logs"),
            "secrets": str(secrets_path(self.run_dir, self.attempt)),
            "node": self.node.name,
            "address": self.address,
            "interface": self.interface,
            "private_dir": str(self.private_dir),
        }


def secrets_path(run_dir: Path, attempt: int) -> Path:
    return run_dir / "secrets" / f"attempt-{attempt}.json"


def job_marker(secrets: Secrets) -> str:
    """A word that no other attempt's processes have in their environment; it does not give the token away."""
    return "hpc-gym-" + _digest(secrets, "marker")[:16]


def _digest(secrets: Secrets, purpose: str) -> str:
    return hmac.new(secrets.token.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def host_name() -> str:
    """This node's name. In a job that of Slurm: `hostname` may say it with a domain, which Slurm does not know."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_address(plan: Plan, toward: str = "") -> tuple[str, str]:
    """(address, interface) of this node that the other nodes reach it by.

    That of the profile's interface; else of the one that leads to `toward`. Raises UserError for an unknown interface.
    """
    if plan.launch.kind == "local":
        return "127.0.0.1", "lo"
    interfaces = {
        name: [each.address for each in addresses if each.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if (wanted := plan.launch.network_interface) is not None:
        if not interfaces.get(wanted):
            known = ", ".join(sorted(name for name, found in interfaces.items() if found))
            raise UserError(
                f"network_interface: {wanted} has no IPv4 address on {socket.gethostname()}; those with one: {known}"
            )
        return interfaces[wanted][0], wanted
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only picks the route.
        probe.connect((toward or _own_name(), 9))
        address = str(probe.getsockname()[0])
    interface = next((name for name, found in interfaces.items() if address in found), "lo")
    return address, interface


def _own_name() -> str:
    """This host's name, where it resolves to an address that others can reach; else an address beyond the default
    route.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return socket.gethostname()
    except OSError:
        pass
    return "192.0.2.1"
