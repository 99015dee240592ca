"""What of a running job can be seen or reached by whoever should not: functions for any job on the test cluster.

A planted word is looked for as it is, in base64 and in hexadecimal, in whatever is compressed with gzip too.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster
from slurm_jobs import SlurmJob

PYTHON = "/usr/bin/python3"
ANOTHER_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

# Ports of the hosts in argv that take a connection, and what they say to a request that carries no token.
_SCAN = """
import json, socket, sys
def is_open(host, port):
    with socket.socket() as link:
        link.settimeout(2)
        return link.connect_ex((host, port)) == 0
def answer(host, port):
    try:
        with socket.create_connection((host, port), timeout=2) as link:
            link.sendall(b"GET / HTTP/1.1\\r\\nHost: " + host.encode() + b"\\r\\nConnection: close\\r\\n\\r\\n")
            return link.recv(300).decode(errors="replace").partition("\\r\\n")[0][:80]
    except TimeoutError:
        return "(silence)"
    except OSError:
        return ""
found = {}
for host in sys.argv[1:]:
    ports = [port for port in range(1, 65536) if is_open(host, port)]
    found[host] = {str(port): answer(host, port) for port in ports}
print(json.dumps(found))
"""

_REQUEST = """
import json, sys, urllib.error, urllib.request
body = json.loads(sys.argv[2])
data = None if body is None else json.dumps(body).encode()
try:
    wanted = urllib.request.Request(sys.argv[1], data, {"Content-Type": "application/json"})
    status = urllib.request.urlopen(wanted, timeout=10).status
except urllib.error.HTTPError as error:
    status = error.code
print(json.dumps({"status": status}))
"""

# What this user can open on this node: environments of others, files below the folders in argv, Unix sockets.
_REACH = """
import json, os, socket, sys
found = {"environments": [], "files": [], "listed": [], "sockets": []}
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "mem", "maps"):
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.getuid() and open(f"/proc/{pid}/{name}", "rb").read(1):
                found["environments"].append(f"/proc/{pid}/{name}")
        except OSError:
            pass
for top in sys.argv[1:]:
    for folder, _, names in os.walk(top):
        found["listed"].append(folder)
        for name in names:
            path = os.path.join(folder, name)
            try:
                if os.stat(path).st_uid != os.getuid() and os.path.isfile(path):
                    open(path, "rb").close()
                    found["files"].append(path)
            except OSError:
                pass
kinds = {1: socket.SOCK_STREAM, 2: socket.SOCK_DGRAM, 5: socket.SOCK_SEQPACKET}
for line in open("/proc/net/unix").read().splitlines()[1:]:
    fields = line.split()
    if len(fields) < 8:
        continue
    path = fields[7]
    try:
        with socket.socket(socket.AF_UNIX, kinds[int(fields[4], 16)]) as link:
            link.settimeout(2)
            link.connect("\\0" + path[1:] if path.startswith("@") else path)
            found["sockets"].append(path)
    except (OSError, KeyError):
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Reach:
    """What another user on a node can open of what is not his."""

    environments: list[str]
    """Of processes: environment or memory."""
    files: list[str]
    """Readable, below the folders that were asked for."""
    listed: list[str]
    """Folders there whose names he can list."""
    sockets: list[str]
    """Unix sockets that take his connection; abstract ones begin with @."""


def scan(cluster: Cluster, source: str, hosts: Iterable[str], *, user: Iterable[str] = ()) -> dict[str, dict[int, str]]:
    """All TCP ports of `hosts` that take a connection from the node `source`, with what they answer whoever has no
    token.
    """
    found = _told(cluster, source, (*user, PYTHON, "-c", _SCAN, *hosts))
    return {host: {int(port): said for port, said in ports.items()} for host, ports in found.items()}


def reach_of_another_user(cluster: Cluster, node: str, *folders: str) -> Reach:
    """What a user who is neither root nor the job's can open on a node."""
    return Reach(**_told(cluster, node, (*ANOTHER_USER, PYTHON, "-c", _REACH, *folders)))


def programs(cluster: Cluster, node: str) -> dict[int, str]:
    """The program that listens on each TCP port of a node, whatever the address."""
    found = {}
    for line in cluster.on(node, "ss", "-Htlnp").stdout.splitlines():
        fields = line.split()
        found[int(fields[3].rpartition(":")[2])] = fields[5].split('"')[1] if len(fields) > 5 else ""
    return found


def on_command_lines(words: Mapping[str, str]) -> list[str]:
    """`NAME: command` of every process of this machine and its nodes on whose command line a word stands."""
    return [
        f"{name}: {line[:200].decode(errors='replace')}"
        for line in _each_process("cmdline")
        for name in _found(line.replace(b"\0", b" "), words)
    ]


def variables_of(run: SlurmJob) -> dict[str, list[bytes]]:
    """The environments of all processes of a job, by the name of the process of the plan that they belong to."""
    found: dict[str, list[bytes]] = {}
    for data in _each_process("environ"):
        fields = dict(each.partition(b"=")[::2] for each in data.split(b"\0"))
        # Programs that call themselves something (Ray's, vLLM's) write it over the end of their environment.
        if fields.get(b"HPC_GYM_RUN_DIR") == str(run.run_dir).encode() and b"HPC_GYM_PROCESS" in fields:
            found.setdefault(fields[b"HPC_GYM_PROCESS"].split()[-1].decode(), []).append(data)
    return found


def in_environments(words: Mapping[str, str], run: SlurmJob) -> dict[str, set[str]]:
    """By word, the processes of the plan that have it in the environment of one of theirs."""
    found = {name: set[str]() for name in words}
    for process, environments in variables_of(run).items():
        for data in environments:
            for name in _found(data, words):
                found[name].add(process)
    return found


def request(cluster: Cluster, node: str, port: int, path: str, body: object = None) -> int:
    """Status with which a port on loopback answers another user; with `body`, to a POST of that JSON."""
    told = _told(
        cluster, node, (*ANOTHER_USER, PYTHON, "-c", _REQUEST, f"http://127.0.0.1:{port}{path}", json.dumps(body))
    )
    return int(told["status"])


def coordinator_of(run: SlurmJob) -> int:
    """The port of the coordinator."""
    for data in _each_process("environ"):
        fields = dict(each.partition(b"=")[::2] for each in data.split(b"\0"))
        if fields.get(b"HPC_GYM_JOB_ID") == run.id.encode() and b"HPC_GYM_COORDINATOR" in fields:
            return int(fields[b"HPC_GYM_COORDINATOR"].rpartition(b":")[2])
    raise AssertionError(f"no supervisor of job {run.id} is alive")


def in_files(words: Mapping[str, str], *paths: Path, but: Iterable[Path] = ()) -> list[str]:
    """`NAME: file` of every file at or below the paths that holds a word, those below `but` left out."""
    spared = tuple(but)
    return sorted(
        f"{name}: {file}"
        for file in dict.fromkeys(file for path in paths for file in _files(path))
        if not any(file.is_relative_to(each) for each in spared)
        for name in _found(_bytes(file), words)
    )


def in_slurms_records(words: Mapping[str, str], run: SlurmJob) -> list[str]:
    """What Slurm tells of the job that holds a word."""
    asked = [
        ("scontrol", "show", "job", "-d", run.id),
        ("scontrol", "show", "step", run.id),
        ("scontrol", "write", "batch_script", run.id, "-"),
        ("squeue", "--noheader", "--format=%all"),
        ("sacct", "--parsable2", f"--jobs={run.id}", "--format=ALL"),
        ("sacct", f"--jobs={run.id}", "--batch-script"),
        ("sacct", f"--jobs={run.id}", "--env-vars"),
    ]
    return [
        f"{name}: {' '.join(command)}"
        for command in asked
        for name in _found(run.cluster.slurm(*command).encode(), words)
    ]


def _told(cluster: Cluster, node: str, command: Iterable[str]) -> dict[str, Any]:
    done = cluster.on(node, *command, timeout=240)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _each_process(name: str) -> Iterator[bytes]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (folder / name).read_bytes()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    # Unlike rglob, it passes over what vanishes meanwhile.
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def _bytes(file: Path) -> bytes:
    try:
        data = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    except OSError:
        return b""
    with contextlib.suppress(OSError, EOFError):
        if data[:2] == b"\x1f\x8b":
            data += gzip.decompress(data)
    return data


def _found(data: bytes, words: Mapping[str, str]) -> Iterator[str]:
    yield from (name for name, word in words.items() if any(form in data for form in _forms(word)))


def _forms(word: str) -> Iterator[bytes]:
    plain = word.encode()
    yield plain
    yield plain.hex().encode()
    for shift in range(3):
        # Which letters base64 gives depends on where the word begins; those at both ends also on its neighbours.
        yield base64.b64encode(b"\0" * shift + plain)[4 if shift else 0 : -4]
