"""A real multi-node Slurm on one machine, for the tests: see the README beside this file.

Every node is a set of Linux namespaces (network, host name, mounts, processes, IPC) with an address on a private bridge
and a slurmd of its own. Controller, accounting and munge run on one more, `head`. The machine itself is the login node.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import (
    ACCOUNTING_PACKAGES,
    PACKAGES,
    ClusterError,
    claim_network,
    die_with_parent,
    install,
    start_time,
    write_hosts,
)

FILES = Path(__file__).resolve().parent / "files"
_LONG = 90.0
"""Seconds that a step of `up` may take: it takes well under one, but the machine may be busy with other things."""
MARKER = ".hpc-gym-slurm"
"""Names a folder as made by us: only such a folder is ever emptied."""


def _works_in_tmp() -> bool:
    """Whether the checkout, its interpreter or the cache that the tests use lies under /tmp."""
    cache = os.environ.get("HPC_GYM_CACHE", Path.home() / ".cache")
    return any(Path(path).resolve().is_relative_to("/tmp") for path in (__file__, sys.executable, cache))


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
    private_tmp: int = dataclasses.field(default_factory=lambda: int(not _works_in_tmp()))
    """1: every node has a /tmp of its own, which shows what should have been on shared storage. 0 where the nodes would
    lose the checkout or the runtimes with it.
    """
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


def main(command: str) -> None:
    """The commands `up` and `down`."""
    parser = argparse.ArgumentParser(prog=command, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/hpc-gym-slurm"), help="state, logs and configuration")
    if command == "up":
        defaults = Settings()
        for field in dataclasses.fields(Settings):
            kind = {"int": int, "str": str}[str(field.type)]
            default = getattr(defaults, field.name)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"default {default!r}")
    else:
        parser.add_argument("--purge", action="store_true", help="remove the folder with its logs too")
    options = vars(parser.parse_args())
    if os.geteuid() != 0:
        os.execvp("sudo", ["sudo", sys.executable, *sys.argv])
    cluster = Cluster(options.pop("dir"))
    try:
        if command == "up":
            cluster.up(**{name: value for name, value in options.items() if value is not None})
            print(cluster.slurm("sinfo"), end="")
            print(f". {cluster.directory}/env    and this shell talks to the cluster; logs: {cluster.directory}/log")
        else:
            cluster.down(**options)
    except ClusterError as error:
        sys.exit(f"slurm: {error}")


class Cluster:
    """One cluster, alive or not, under `directory`; two with different directories live side by side.

    `attached`: it dies with this process, even where nobody gets to call `down`.
    """

    def __init__(self, directory: Path, attached: bool = False) -> None:
        self.directory = directory.absolute()
        self._attached = attached

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands talk to this cluster."""
        ours = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))
        }
        return ours | {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf")}

    @property
    def shared(self) -> Path:
        """A folder that the login node and all nodes see, as a cluster's shared file system."""
        return self.directory / "shared"

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.settings().nodes + 1)]

    def up(self, **changes: int | str) -> None:
        """Start the cluster with these `Settings`, or what of it has died; `changes` count for a fresh start only."""
        with self._lock():
            if self._init_pid("head") is not None:
                self._start_what_is_missing()
                return
            self._clear()
            settings = Settings(**changes)  # type: ignore[arg-type]
            install(PACKAGES + (ACCOUNTING_PACKAGES if settings.accounting else ()), self.directory / "log")
            self._write_state(settings, claim_network())
            try:
                self._start_what_is_missing()
            except BaseException:
                self._clear()
                raise

    def down(self, purge: bool = False) -> None:
        """Stop what `up` started, and nothing else. The logs stay, unless `purge`."""
        if not (self.directory / MARKER).exists():
            return
        with self._lock():
            self._clear()
        if purge:
            shutil.rmtree(self.directory)

    def on(self, node: str, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on a node outside any job."""
        return subprocess.run(
            self._inside(node, command), env=self.env, capture_output=True, text=True, timeout=timeout
        )

    def tmp(self, node: str) -> Path:
        """A node's /tmp, as the machine sees it."""
        return self.directory / "nodes" / node / "tmp" if self.settings().private_tmp else Path("/tmp")

    def crash(self, node: str) -> None:
        """A power cut: everything on the node dies at once. `up` brings the node back."""
        pid = self._init_pid(node)
        if pid is None:
            raise ClusterError(f"{node} is not running")
        os.kill(pid, signal.SIGKILL)

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free."""
        jobs = self.slurm("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.slurm("scancel", *jobs)
        self._wait("an empty queue", _LONG, lambda: not self.slurm("squeue", "-h", "-o", "%A").strip())

    def slurm(self, *command: str) -> str:
        """Standard output of one of Slurm's commands. Raises ClusterError with its message when it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def processes(self, node: str) -> dict[int, str]:
        """What runs on a node besides Slurm and the node's first process: by the machine's process ids."""
        return {
            pid: line
            for pid, (name, line) in self.everything(node).items()
            if not name.startswith(("slurm", "epilog")) and line != "sleep 3600"
        }

    def everything(self, node: str) -> dict[int, tuple[str, str]]:
        """(name, command line) of all that runs on a node but its first process: by the machine's process ids."""
        init, found = self._init_pid(node), {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "ns" / "pid").readlink() == Path(f"/proc/{init}/ns/pid").readlink():
                    line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    name = (path / "comm").read_text().strip()
                    if line and int(path.name) != init:
                        found[int(path.name)] = (name, line)
        return found

    def kill_daemon(self, host: str, daemon: str) -> None:
        """Kill one daemon of a node or of `head` with SIGKILL, alone. `up` starts it again."""
        for pid in self._pids(host, daemon):
            os.kill(pid, signal.SIGKILL)

    # ---- state ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if self.directory.exists() and any(self.directory.iterdir()) and not (self.directory / MARKER).exists():
            raise ClusterError(f"{self.directory} is not empty and was not made by this command")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        (self.directory / MARKER).touch()
        for folder in ("log", "run", "shared"):
            (self.directory / folder).mkdir(exist_ok=True)
        with (self.directory / MARKER).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def settings(self) -> Settings:
        """How the living cluster was made."""
        return Settings(**json.loads((self.directory / "run" / "settings.json").read_text()))

    def _network(self) -> int:
        return int((self.directory / "run" / "network").read_text())

    def _address(self, host: str) -> str:
        return f"10.77.{self._network()}.{2 if host == 'head' else 10 + int(host.removeprefix('node'))}"

    def _write_state(self, settings: Settings, network: int) -> None:
        """All files of a fresh cluster."""
        for folder in ("etc", "bin", "munge", "dev", "nodes", "spool/ctld", "spool/mysql"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        (self.directory / "munge").chmod(0o700)
        (self.directory / "munge" / "key").write_bytes(os.urandom(128))
        (self.directory / "munge" / "key").chmod(0o600)
        (self.directory / "run" / "network").write_text(str(network))
        (self.directory / "run" / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
        prefix = f"10.77.{network}"
        addresses = [f"{prefix}.1 login", f"{prefix}.2 head"]
        addresses += [f"{self._address(name)} {name}" for name in self.node_names]
        etc = self.directory / "etc"
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(addresses) + "\n")
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        (etc / "gres.conf").write_text(self._gres(settings))
        (self.directory / "env").write_text(f"export SLURM_CONF={etc}/slurm.conf\n")
        values = {name.upper(): value for name, value in dataclasses.asdict(settings).items()} | {
            "DIR": self.directory,
            "NET": prefix,
            "FIRST_JOB_ID": int((time.time() - 1_700_000_000) / 10),
            "DEF_MEM_PER_CPU": settings.memory_mb // settings.cpus // 2,
            "ACCOUNTING": "\n".join(self._accounting_lines(settings)),
            "NODE_LINES": "\n".join(
                f"NodeName={name} NodeAddr={self._address(name)} CPUs={settings.cpus} RealMemory={settings.memory_mb}"
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

    def _accounting_lines(self, settings: Settings) -> list[str]:
        if not settings.accounting:
            return ["AccountingStorageType=accounting_storage/none"]
        return [
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={self._address('head')}",
            f"AccountingStoragePass={self.directory}/run/munge.socket",
            "AccountingStorageTRES=gres/gpu",
        ]

    def _gres(self, settings: Settings) -> str:
        """gres.conf, and a device file per GPU: without one Slurm does not set CUDA_VISIBLE_DEVICES."""
        for number in range(settings.gpus):
            subprocess.run(
                ["mknod", "-m", "666", self.directory / "dev" / f"nvidia{number}", "c", "1", "3"], check=True
            )
        return f"Name=gpu Type=h100 File={self.directory}/dev/nvidia[0-{settings.gpus - 1}]\n" if settings.gpus else ""

    def _clear(self) -> None:
        """Stop every host and remove what belongs to one life of the cluster."""
        pids = [pid for path in (self.directory / "run").glob("host.*") if (pid := self._init_pid(path.suffix[1:]))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._wait("the end of the nodes", _LONG, lambda: not any(start_time(pid) for pid in pids))
        if (self.directory / "run" / "network").exists():
            bridge = f"hgs{self._network()}"
            subprocess.run(["ip", "link", "del", bridge], capture_output=True)
            if self.settings().hosts:
                write_hosts(bridge, "")
        for folder in ("run", "spool", "mysql", "nodes", "munge", "etc", "bin", "dev"):
            shutil.rmtree(self.directory / folder, ignore_errors=True)
        (self.directory / "run").mkdir()

    # ---- hosts and daemons ---------------------------------------------------------------------------------------

    def _start_what_is_missing(self) -> None:
        settings = self.settings()
        if settings.hosts:
            write_hosts(f"hgs{self._network()}", (self.directory / "etc" / "hosts").read_text())
        for name in ("head", *self.node_names):
            self._start_host(name)
        self._start_controller(settings)
        for name in self.node_names:
            self._start_daemon(name, "slurmd", "slurmd", "-N", name)
        self._wait("the nodes", 2 * _LONG, self._all_idle)

    def _init_pid(self, host: str) -> int | None:
        """Process id of the first process of a host, if it lives (a recycled process id is not taken for it)."""
        try:
            pid, started = (self.directory / "run" / f"host.{host}").read_text().split()
        except FileNotFoundError:
            return None
        return int(pid) if start_time(int(pid)) == started else None

    def _start_host(self, name: str) -> None:
        if self._init_pid(name) is not None:
            return
        here = self.directory / "nodes" / name
        here.mkdir(parents=True, exist_ok=True)
        (here / "ready").unlink(missing_ok=True)
        with (self.directory / "log" / f"{name}.init.log").open("w") as log:
            parent = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc",
                 self.directory / "bin" / "init", name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=die_with_parent if self._attached else None,
            )  # fmt: skip
        self._wait(f"the namespaces of {name}", _LONG, (here / "ready").exists)
        pid = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()[0])
        (self.directory / "run" / f"host.{name}").write_text(f"{pid} {start_time(pid)}")
        bridge, veth = f"hgs{self._network()}", f"hgs{self._network()}-{name.removeprefix('node')}"
        subprocess.run(["ip", "link", "del", veth], capture_output=True)
        for line in (
            f"ip link add {veth} type veth peer name eth0 netns {pid}",
            f"ip link set {veth} master {bridge} up",
            f"nsenter -t {pid} -n ip link set lo up",
            f"nsenter -t {pid} -n ip link set eth0 up",
            f"nsenter -t {pid} -n ip addr add {self._address(name)}/24 dev eth0",
            f"nsenter -t {pid} -n ip route add default via 10.77.{self._network()}.1",
        ):
            done = subprocess.run(line.split(), capture_output=True, text=True)
            if done.returncode != 0:
                raise ClusterError(f"could not give {name} its network: {line}: {done.stderr.strip()}")

    def _start_controller(self, settings: Settings) -> None:
        run, munge = self.directory / "run", self.directory / "munge"
        self._start_daemon(
            "head", "munged", "munged", f"--key-file={munge}/key", f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.directory}/log/munged.log", f"--seed-file={munge}/seed", "--num-threads=4", "--force",
        )  # fmt: skip
        self._wait("munged", _LONG, self._succeeds("munge", "-S", f"{run}/munge.socket", "-n"))
        if settings.accounting:
            self._start_accounting()
        self._start_daemon("head", "slurmctld", "slurmctld")
        self._wait("slurmctld", _LONG, self._succeeds("scontrol", "ping"))

    def _start_accounting(self) -> None:
        defaults = f"--defaults-file={self.directory}/etc/my.cnf"
        if not (self.directory / "mysql" / "mysql").is_dir():
            made = subprocess.run(
                ["mariadb-install-db", defaults, "--skip-test-db", "--auth-root-authentication-method=normal"],
                capture_output=True, text=True,
            )  # fmt: skip
            if made.returncode != 0:
                log = self.directory / "log" / "mariadb.log"
                told = log.read_text()[-1500:] if log.exists() else made.stdout + made.stderr
                raise ClusterError(f"could not make the accounting database (exit code {made.returncode}): {told}")
        self._start_daemon("head", "mariadbd", "mariadbd", defaults, wait=False)
        self._wait(
            "mariadbd", _LONG, self._succeeds("mariadb", "-S", f"{self.directory}/run/mysql.sock", "-e", "select 1")
        )
        fresh = not self._pids("head", "slurmdbd")
        self._start_daemon("head", "slurmdbd", "env", f"MYSQL_UNIX_PORT={self.directory}/run/mysql.sock", "slurmdbd")
        self._wait("slurmdbd", _LONG, self._succeeds("sacctmgr", "-n", "show", "cluster"))
        if fresh:
            subprocess.run(["sacctmgr", "-i", "-Q", "add", "cluster", "hpcgym"], env=self.env, capture_output=True)

    def _start_daemon(self, host: str, name: str, *command: str, wait: bool = True) -> None:
        if self._pids(host, name):
            return
        started = subprocess.Popen(
            self._inside(host, command), env=self.env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if wait and started.wait(_LONG) != 0:
            raise ClusterError(
                f"{' '.join(command)} on {host} ended with {started.returncode}; logs: {self.directory}/log"
            )

    def _inside(self, host: str, command: Sequence[str]) -> list[str]:
        pid = self._init_pid(host)
        if pid is None:
            raise ClusterError(f"{host} is not running")
        return ["nsenter", "-t", str(pid), "-m", "-u", "-n", "-i", "-p", "-r", "-w", "--", *command]

    def _pids(self, host: str, name: str) -> list[int]:
        """The machine's process ids of all processes of that name on a host."""
        init = self._init_pid(host)
        if init is None:
            return []
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                same = (path / "ns" / "pid").readlink() == Path(f"/proc/{init}/ns/pid").readlink()
                if same and (path / "comm").read_text().strip() == name and start_time(int(path.name)):
                    found.append(int(path.name))
        return found

    def _succeeds(self, *command: str) -> Callable[[], bool]:
        return lambda: subprocess.run(command, env=self.env, capture_output=True).returncode == 0

    def _all_idle(self) -> bool:
        rows = [line.split() for line in self.slurm("sinfo", "-hNpgpu", "-o%N %T").splitlines()]
        for name, state in rows:
            # What Slurm or a test took out of service for a fault that is over.
            if state.startswith("drain") or state == "down":
                with contextlib.suppress(ClusterError):
                    self.slurm("scontrol", "update", f"NodeName={name}", "State=RESUME")
        states = [state for _, state in rows]
        return len(states) == len(self.node_names) and set(states) <= {"idle", "mixed", "allocated", "completing"}

    def _wait(self, what: str, seconds: float, done: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                newest = max((self.directory / "log").glob("*.log"), key=lambda path: path.stat().st_mtime)
                tail = newest.read_text()[-1500:]
                raise ClusterError(f"{what} not within {seconds:.0f} s; the end of {newest}:\n{tail}")
            time.sleep(0.05)


def _fill(text: str, values: Mapping[str, object]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda match: str(values[match[1]]), text)
