"""Asks a process whether it is ready, and makes sure that it is this process that answers.

A port proves nothing: another job's server may answer on it. So vLLM is asked on a Unix socket in the node's private
directory, and NeMo Gym's servers must be processes that descend from ours.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from hpc_gym.node.notifications import Said

ANSWER_WITHIN_S = 5.0


@dataclass(frozen=True)
class Answer:
    """`alive`: it answered as it should. `text` says how far it is, or what is wrong. `servers`: names of those behind
    it that answered too, by pid.
    """

    alive: bool
    text: str = ""
    servers: Mapping[int, str] = field(default_factory=dict)


async def ask_http(path: Path, url_path: str, within_s: float = ANSWER_WITHIN_S) -> Answer:
    """Whether `GET url_path` on the Unix socket at `path` answers with 200."""
    try:
        status, _ = await _get(lambda: asyncio.open_unix_connection(str(path)), "localhost", url_path, within_s)
    except FileNotFoundError:
        return Answer(False, "it does not listen yet")
    except ConnectionRefusedError:
        return Answer(False, "nothing listens on its socket")
    except (OSError, ValueError, TimeoutError) as error:
        return Answer(False, f"GET {url_path}: {str(error) or type(error).__name__}")
    return Answer(status == 200, f"GET {url_path} answered {status}")


def refuses(path: Path) -> bool:
    """Whether nothing listens on the Unix socket at `path`. Never waits: a server that is only busy does not refuse."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            pass
    return False


async def get_text(path: Path, url_path: str) -> str:
    """What `GET url_path` on the Unix socket at `path` answers, or why it does not."""
    try:
        _, body = await _get(lambda: asyncio.open_unix_connection(str(path)), "localhost", url_path)
    except (OSError, ValueError, TimeoutError) as error:
        return str(error) or type(error).__name__
    return body.decode(errors="replace")


async def ask_gym(port: int, own_pids: Callable[[], Collection[int]]) -> Answer:
    """Whether NeMo Gym's head server on `port` lists servers that are all ours and all answer `GET /`.

    `own_pids`: pids of the process and everything below it, asked after the head has answered.
    """
    try:
        status, body = await _get_tcp(port, "/server_instances")
        instances = json.loads(body) if status == 200 else []
        servers = [(str(each["name"]), int(each["pid"]), str(each["url"])) for each in instances]
    except ConnectionRefusedError:
        return Answer(False, "its head server does not listen yet")
    except (OSError, ValueError, KeyError, TypeError, TimeoutError) as error:
        return Answer(False, f"its head server: {str(error) or type(error).__name__}")
    if not servers:
        return Answer(False, "its head server lists no servers yet")
    own = own_pids()
    if strangers := [f"{name} (pid {pid})" for name, pid, _ in servers if pid not in own]:
        return Answer(False, f"port {port} is answered by servers that are not ours: {', '.join(strangers)}")
    answers = await asyncio.gather(*(_answers(url) for _, _, url in servers))
    missing = [name for (name, _, _), good in zip(servers, answers, strict=True) if not good]
    text = f"{sum(answers)} / {len(servers)} servers"
    if missing:
        return Answer(False, f"{text}, waiting for {', '.join(missing)}")
    return Answer(True, text, {pid: name for name, pid, _ in servers})


def watchdog_overdue(said: Said, since: float, alive_within_s: float) -> str:
    """Why a process that says `WATCHDOG=1` counts as hung, "" when it does not. `since`: moment it had to begin,
    monotonic.
    """
    silent = time.monotonic() - max(since, said.last_watchdog)
    if not alive_within_s or silent <= alive_within_s:
        return ""
    last = f"; last status: {said.status}" if said.status else ""
    return f"hung: no sign of life for {silent:.0f} s (allowed: {alive_within_s:g} s){last}"


async def _answers(url: str) -> bool:
    parts = urlsplit(url)
    try:
        status, _ = await _get_tcp(parts.port or 80, "/", parts.hostname or "127.0.0.1")
    except (OSError, ValueError, TimeoutError):
        return False
    return status == 200


async def _get_tcp(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    return await _get(lambda: asyncio.open_connection(host, port), f"{host}:{port}", path)


async def _get(
    connect: Callable[[], object], host: str, path: str, within_s: float = ANSWER_WITHIN_S
) -> tuple[int, bytes]:
    """(status, body) of a GET, over a connection of its own. A few lines, so that a supervisor starts without an HTTP
    library.
    """
    async with asyncio.timeout(within_s):
        reader, writer = await connect()  # type: ignore[misc]
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer: bytes = await reader.read(1 << 22)
            while chunk := await reader.read(1 << 22):
                answer += chunk
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/"):
        raise ValueError("it does not speak HTTP")
    return int(words[1]), body
