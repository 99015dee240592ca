"""One life of a test cluster, from a fresh start to its end: its settings, names, addresses and files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILES = Path(__file__).resolve().parent / "files"


def _seen_in_tmp(directory: Path) -> list[Path]:
    """What the nodes need of the machine's /tmp, the outer folders first: the cluster's folder, and the checkout, its
    interpreter and the cache that the tests use, where they lie there.
    """
    checkout, cache = Path(__file__).parents[3], Path(os.environ.get("HPC_GYM_CACHE", Path.home() / ".cache"))
    found = {path.resolve() for path in (directory, checkout, Path(sys.prefix), cache)}
    return sorted(path for path in found if path.is_relative_to("/tmp") and path.is_dir())


@dataclass(frozen=True)
class Settings:
    """How the cluster is made. Times in seconds; production's defaults stand in brackets."""

    nodes: int = 5
    cpus: int = 16
    """Claimed per node, as are memory and GPUs: all nodes share the machine's."""
    memory_mb: int = 64000
    gpus: int = 8
    accounting: int = 1
    """0: no slurmdbd, so no `sacct`."""
    hosts: int = 0
    """1: the nodes' names are written to the machine's /etc/hosts too."""
    kill_wait: int = 5
    """From SIGTERM to SIGKILL (30)."""
    slurmd_timeout: int = 10
    """Silence after which a node is down (300)."""
    min_job_age: int = 60
    """How long `scontrol` and `squeue` know a finished job (300)."""
    requeue_wait: int = 10
    """What a requeued job waits before it may start (120)."""
    grace: int = 10
    """Grace time of the partition `preempt`."""
    extra: str = ""
    """Further lines for slurm.conf."""


@dataclass(frozen=True)
class Life:
    """Computes what everything of the cluster in `directory` is called and where it is."""

    directory: Path
    settings: Settings
    network: int
    """N of its addresses, 10.77.N.0/24."""

    @classmethod
    def read(cls, directory: Path) -> Life:
        """That of the living cluster."""
        settings = Settings(**json.loads((directory / "run" / "settings.json").read_text()))
        return cls(directory, settings, int((directory / "run" / "network").read_text()))

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.settings.nodes + 1)]

    @property
    def prefix(self) -> str:
        """The first three parts of every address."""
        return f"10.77.{self.network}"

    @property
    def bridge(self) -> str:
        """The interface of the machine that joins the nodes."""
        return f"hgs{self.network}"

    def address(self, host: str) -> str:
        """Of a node, or of `head`."""
        return f"{self.prefix}.{2 if host == 'head' else 10 + int(host.removeprefix('node'))}"

    def hardware_address(self, host: str) -> str:
        """Stays what it was when a host comes back, as a machine's does: others have it in their tables."""
        return f"02:77:00:00:{self.network:02x}:{int(self.address(host).rpartition('.')[2]):02x}"

    def write(self) -> None:
        """All files of a fresh cluster."""
        settings = self.settings
        for folder in ("etc", "bin", "munge", "dev", "nodes", "spool/ctld", "spool/mysql"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        (self.directory / "munge").chmod(0o700)
        (self.directory / "munge" / "key").write_bytes(os.urandom(128))
        (self.directory / "munge" / "key").chmod(0o600)
        (self.directory / "run" / "network").write_text(str(self.network))
        (self.directory / "run" / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
        addresses = [f"{self.prefix}.1 login", f"{self.address('head')} head"]
        addresses += [f"{self.address(name)} {name}" for name in self.node_names]
        etc = self.directory / "etc"
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(addresses) + "\n")
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        (etc / "gres.conf").write_text(self._gres())
        (self.directory / "env").write_text(f"export SLURM_CONF={etc}/slurm.conf\n")
        values = {name.upper(): value for name, value in dataclasses.asdict(settings).items()} | {
            "DIR": self.directory,
            "SEEN_IN_TMP": shlex.join(map(str, _seen_in_tmp(self.directory))),
            "NET": self.prefix,
            "FIRST_JOB_ID": int((time.time() - 1_700_000_000) / 10),
            "DEF_MEM_PER_CPU": settings.memory_mb // settings.cpus // 2,
            "ACCOUNTING": "\n".join(self._accounting_lines()),
            "NODE_LINES": "\n".join(
                f"NodeName={name} NodeAddr={self.address(name)} CPUs={settings.cpus} RealMemory={settings.memory_mb}"
                f"{f' Gres=gpu:h100:{settings.gpus}' if settings.gpus else ''} State=UNKNOWN"
                for name in self.node_names
            ),
        }
        for name, folder, mode in (
            ("slurm.conf", "etc", 0o644),
            ("slurmdbd.conf", "etc", 0o600),
            ("my.cnf", "etc", 0o644),
            ("init", "bin", 0o755),
            ("epilog", "bin", 0o755),
        ):
            target = self.directory / folder / name
            target.write_text(_fill((FILES / name).read_text(), values))
            target.chmod(mode)

    def _accounting_lines(self) -> list[str]:
        if not self.settings.accounting:
            return ["AccountingStorageType=accounting_storage/none"]
        return [
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={self.address('head')}",
            f"AccountingStoragePass={self.directory}/run/munge.socket",
            "AccountingStorageTRES=gres/gpu",
        ]

    def _gres(self) -> str:
        """gres.conf, and a device file per GPU: without one Slurm does not set CUDA_VISIBLE_DEVICES."""
        for number in range(self.settings.gpus):
            subprocess.run(
                ["mknod", "-m", "666", self.directory / "dev" / f"nvidia{number}", "c", "1", "3"], check=True
            )
        last = self.settings.gpus - 1
        return f"Name=gpu Type=h100 File={self.directory}/dev/nvidia[0-{last}]\n" if last >= 0 else ""


def _fill(text: str, values: Mapping[str, object]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda match: str(values[match[1]]), text)
