"""HTTP connections from the servers of hpc-gym on the nodes to other servers.

There is no cap on how many, for a rollout holds one while it waits; no cookies, which would carry a session from one
rollout into another; and an idle connection is let go of before the other side closes it, or a request would be lost on
a closing one. A session belongs to a running event loop, so it is made when it is first used.
"""

from __future__ import annotations

import aiohttp

SERVERS_KEEP_S = 75
"""Seconds after which hpc-gym's own servers close an idle connection: longer than any client keeps one."""
_OURS_S = 60.0
_UVICORN_S = 3.0
"""uvicorn, under vLLM as under NeMo Gym, closes idle connections after 5 s."""


def over_socket(path: str) -> aiohttp.ClientSession:
    """To a vLLM that listens on a Unix socket."""
    return _session(aiohttp.UnixConnector(path, limit=0, keepalive_timeout=_UVICORN_S))


def to_nemo_gym() -> aiohttp.ClientSession:
    """To NeMo Gym's servers on this node, which answer a run when it is done: no deadline but the caller's own."""
    return _session(aiohttp.TCPConnector(limit=0, keepalive_timeout=_UVICORN_S))


def to_nodes(token: str) -> aiohttp.ClientSession:
    """To hpc-gym's servers on other nodes, with the job's token. A node that is gone takes no connection for 10 s."""
    return _session(aiohttp.TCPConnector(limit=0, keepalive_timeout=_OURS_S), token, connect_s=10.0)


def to_outside(key: str) -> aiohttp.ClientSession:
    """To an address outside the cluster, which may only be reached through the site's proxy."""
    return _session(aiohttp.TCPConnector(limit=0), key, trust_env=True)


def _session(
    connector: aiohttp.BaseConnector, token: str = "", *, connect_s: float | None = None, trust_env: bool = False
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        trust_env=trust_env,
    )
