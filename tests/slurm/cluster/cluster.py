"""A real multi-node Slurm on one machine, for the tests: see the README beside this file.

Every node is a set of Linux namespaces (network, host name, mounts, processes, IPC) with an address on a private bridge
and a slurmd of its own. Controller, accounting and munge run on one more, `head`. The machine itself is the login node.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster_life import Life, Settings
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

_LONG = 90.0
"""Seconds that a step of `up` may take: it takes well under one, but the machine may be busy with other things."""
MARKER = ".hpc-gym-slurm"
"""Names a folder as made by us: only such a folder is ever emptied."""


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
        return self._life().node_names

    def settings(self) -> Settings:
        """How the living cluster was made."""
        return self._life().settings

    def up(self, **changes: int | str) -> None:
        """Start the cluster with these `Settings`, or what of it has died; `changes` count for a fresh start only."""
        with self._lock():
            if self._init_pid("head") is not None:
                self._start_what_is_missing()
                return
            self._clear()
            settings = Settings(**changes)  # type: ignore[arg-type]
            install(PACKAGES + (ACCOUNTING_PACKAGES if settings.accounting else ()), self.directory / "log")
            Life(self.directory, settings, claim_network()).write()
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
        return self.directory / "nodes" / node / "tmp"

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

    def stir(self) -> None:
        """Lets something happen, as it does all the time on a cluster that is used. Without any change the backfill
        scheduler of 22.05, which alone starts heterogeneous jobs, does not look whether one that waited may start.
        """
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            self.slurm("scontrol", "update", f"NodeName={self.node_names[-1]}", "Comment=stirred")

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

    def _life(self) -> Life:
        return Life.read(self.directory)

    def _clear(self) -> None:
        """Stop every host and remove what belongs to one life of the cluster."""
        pids = [pid for path in (self.directory / "run").glob("host.*") if (pid := self._init_pid(path.suffix[1:]))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._wait("the end of the nodes", _LONG, lambda: not any(start_time(pid) for pid in pids))
        if (self.directory / "run" / "network").exists():
            life = self._life()
            subprocess.run(["ip", "link", "del", life.bridge], capture_output=True)
            if life.settings.hosts:
                write_hosts(life.bridge, "")
        for folder in ("run", "spool", "mysql", "nodes", "munge", "etc", "bin", "dev"):
            shutil.rmtree(self.directory / folder, ignore_errors=True)
        (self.directory / "run").mkdir()

    # ---- hosts and daemons ---------------------------------------------------------------------------------------

    def _start_what_is_missing(self) -> None:
        life = self._life()
        settings = life.settings
        if settings.hosts:
            write_hosts(life.bridge, (self.directory / "etc" / "hosts").read_text())
        for name in ("head", *self.node_names):
            self._start_host(name)
        self._start_controller(settings)
        for name in [each for each in self.node_names if self._start_daemon(each, "slurmd", "slurmd", "-N", each)]:
            # A node that was away for a moment only may never have been missed: its state does not tell.
            self._wait(f"slurmd on {name}", _LONG, self._listens(name, 6818))
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
        life = self._life()
        veth = f"{life.bridge}-{name.removeprefix('node')}"
        subprocess.run(["ip", "link", "del", veth], capture_output=True)
        for line in (
            f"ip link add {veth} type veth peer name eth0 address {life.hardware_address(name)} netns {pid}",
            f"ip link set {veth} master {life.bridge} up",
            f"nsenter -t {pid} -n ip link set lo up",
            f"nsenter -t {pid} -n ip link set eth0 up",
            f"nsenter -t {pid} -n ip addr add {life.address(name)}/24 dev eth0",
            f"nsenter -t {pid} -n ip route add default via {life.prefix}.1",
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

    def _start_daemon(self, host: str, name: str, *command: str, wait: bool = True) -> bool:
        """Whether it had to be started."""
        if self._pids(host, name):
            return False
        started = subprocess.Popen(
            self._inside(host, command), env=self.env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if wait and started.wait(_LONG) != 0:
            raise ClusterError(
                f"{' '.join(command)} on {host} ended with {started.returncode}; logs: {self.directory}/log"
            )
        return True

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

    def _listens(self, host: str, port: int) -> Callable[[], bool]:
        return lambda: f":{port} " in self.on(host, "ss", "-Htln").stdout

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
