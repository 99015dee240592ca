"""The connection between a supervisor and the coordinator: JSON objects, one a line, between two who both know the
token.

The token itself never travels: each side proves that it has it by an HMAC over a number the supervisor drew. So
whoever got hold of the coordinator's port before the coordinator did learns nothing, and a peer without the token
gets no byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from typing import Any

Message = dict[str, Any]

LONGEST = 1 << 20
"""Bytes of one message."""
HELLO_WITHIN_S = 10.0


class Refused(Exception):
    """The other side does not know this attempt's token, or is no coordinator of hpc-gym."""


class Channel:
    """One authenticated connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Message) -> None:
        """Queues a message; never blocks, and is silent when the other side has gone."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> Message | None:
        """The next message, None when the other side has closed or broken the connection."""
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
            if line := await self._reader.readline():
                message: Message = json.loads(line)
                return message
        return None

    async def close(self) -> None:
        """Sends what is queued and closes."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._writer.drain()
                self._writer.close()
                await self._writer.wait_closed()

    def abort(self) -> None:
        self._writer.transport.abort()


async def connect(host: str, port: int, token: str, hello: Message) -> Channel:
    """Connects to the coordinator as the supervisor that `hello` describes.

    Raises OSError when nobody listens there, Refused when it is not our coordinator, TimeoutError.
    """
    nonce = secrets.token_hex(16)
    async with asyncio.timeout(HELLO_WITHIN_S):
        reader, writer = await asyncio.open_connection(host, port, limit=LONGEST)
        channel = Channel(reader, writer)
        body = json.dumps(hello)
        channel.send({"hello": body, "nonce": nonce, "proof": _proof(token, "hello", nonce, body)})
        welcome = await channel.receive()
    if welcome is None or not _proves(welcome.get("proof"), token, "welcome", nonce, ""):
        channel.abort()
        raise Refused(f"what answers on {host}:{port} is not the coordinator of this attempt")
    return channel


async def accept(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, seen: set[str]
) -> tuple[Channel, Message] | None:
    """(channel, hello) of a supervisor that knows the token; for anyone else None, without a word to them.

    `seen`: numbers already used, so that a recorded hello opens nothing.
    """
    channel = Channel(reader, writer)
    try:
        async with asyncio.timeout(HELLO_WITHIN_S):
            message = await channel.receive()
        nonce, body, proof = message["nonce"], message["hello"], message["proof"]  # type: ignore[index]
        if not isinstance(nonce, str) or nonce in seen or not _proves(proof, token, "hello", nonce, body):
            raise Refused
        hello = json.loads(body)
    except (Refused, TimeoutError, KeyError, TypeError, ValueError, AttributeError):
        channel.abort()
        return None
    seen.add(nonce)
    channel.send({"proof": _proof(token, "welcome", nonce, "")})
    return channel, hello


def _proof(token: str, purpose: str, nonce: str, body: str) -> str:
    return hmac.new(token.encode(), f"{purpose}\n{nonce}\n{body}".encode(), hashlib.sha256).hexdigest()


def _proves(proof: object, token: str, purpose: str, nonce: str, body: str) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(proof, _proof(token, purpose, nonce, body))
