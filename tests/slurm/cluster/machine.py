"""What the cluster asks of the machine that carries it: packages, a bridge, host names, processes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2", "procps", "e2fsprogs", "mount")
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server")


class ClusterError(Exception):
    """The cluster could not be started or asked; the text says why."""


def why_not() -> str | None:
    """The reason why no cluster can be started on this machine, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster in namespaces needs root"
    if not _has(PACKAGES) and not shutil.which("apt-get"):
        return f"the packages {' '.join(PACKAGES)} are missing, and there is no apt-get to install them with"
    probe = subprocess.run(
        "unshare --net --uts --mount --pid --ipc --fork --mount-proc sh -c "
        "'ip link add hgprobe type bridge && ip link add hgprobe0 type veth peer name hgprobe1'",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    if probe.returncode != 0:
        return f"namespaces, a bridge or a veth pair cannot be made here: {probe.stderr.strip()}"
    return None


def die_with_parent() -> None:
    """In a child: SIGKILL when the process that started it is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def claim_network() -> int:
    """The number N of a free network 10.77.N.0/24, claimed by making its bridge hgsN."""
    for number in range(100):
        bridge = f"hgs{number}"
        made = subprocess.run(
            ["ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0"], capture_output=True, text=True
        )
        if made.returncode == 0:
            subprocess.run(["ip", "addr", "add", f"10.77.{number}.1/24", "dev", bridge], check=True)
            subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
            _let_through(bridge)
            return number
        if "File exists" not in made.stderr:
            raise ClusterError(f"could not make a network bridge: {made.stderr.strip()}")
    raise ClusterError("the bridges hgs0 to hgs99 are all taken")


def _let_through(bridge: str) -> None:
    """Where bridged packets pass through iptables (a machine with Docker), let ours pass."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if switch.exists() and switch.read_text().strip() == "1" and shutil.which("iptables"):
        rule = ["FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT"]
        if subprocess.run(["iptables", "-C", *rule], capture_output=True).returncode != 0:
            subprocess.run(["iptables", "-I", *rule], capture_output=True)


def write_hosts(bridge: str, names: str) -> None:
    """Put `names` into a marked block of /etc/hosts; an empty text takes the block out."""
    path = Path("/etc/hosts")
    rest = re.sub(rf"# begin {bridge}\n.*?# end {bridge}\n", "", path.read_text(), flags=re.DOTALL)
    ours = "".join(line + "\n" for line in names.splitlines() if "localhost" not in line)
    path.write_text(rest + (f"# begin {bridge}\n{ours}# end {bridge}\n" if ours else ""))


def _has(packages: Sequence[str]) -> bool:
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\n", *packages], capture_output=True, text=True
    )
    return asked.returncode == 0 and all(line.startswith("ii") for line in asked.stdout.split("\n") if line)


def install(packages: Sequence[str], log_dir: Path) -> None:
    """Install what is missing, without starting the packages' own services. One at a time on a machine."""
    if not shutil.which("dpkg-query") or _has(packages):
        return
    with Path("/run/hpc-gym-slurm.install").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _has(packages):
            _install(packages, log_dir)


def _install(packages: Sequence[str], log_dir: Path) -> None:
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    install = f"apt-get install -y -q --no-install-recommends {' '.join(packages)}"
    try:
        with (log_dir / "apt.log").open("w") as log:
            done = subprocess.run(
                f"{install} || {{ apt-get update -q && {install}; }}", shell=True, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )  # fmt: skip
    finally:
        if ours:
            policy.unlink()
    if done.returncode != 0:
        raise ClusterError(f"could not install {' '.join(packages)}:\n{(log_dir / 'apt.log').read_text()[-2000:]}")
