from __future__ import annotations

import asyncio
import json

import pytest

from hpc_gym.node.channel import Channel, Refused, accept, connect

TOKEN = "the-token"


class Server:
    """Accepts supervisors as the coordinator does and answers every message with itself."""

    async def __aenter__(self) -> Server:
        self.greeted: list[dict[str, object]] = []
        self._seen: set[str] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (accepted := await accept(reader, writer, TOKEN, self._seen)) is None:
            return
        channel, hello = accepted
        self.greeted.append(hello)
        while (message := await channel.receive()) is not None:
            channel.send(message)


async def test_who_knows_the_token_is_heard() -> None:
    async with Server() as server:
        channel = await connect("127.0.0.1", server.port, TOKEN, {"rank": 3})
        channel.send({"type": "heartbeat"})
        assert await channel.receive() == {"type": "heartbeat"}
        assert server.greeted == [{"rank": 3}]
        await channel.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"type": "heartbeat"}\n',
        b'{"hello": "{}", "nonce": "00", "proof": "00"}\n',
        b'{"hello": "{}", "nonce": "00", "proof": 7}\n',
        b"[]\n",
        b"\xff\xfe\n",
    ],
)
async def test_who_does_not_know_the_token_gets_nothing(sent: bytes) -> None:
    async with Server() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        writer.write_eof()
        try:
            answer = await asyncio.wait_for(reader.read(), 5)
        except ConnectionResetError:
            answer = b""
        assert answer == b""
        assert server.greeted == []


async def test_a_wrong_token_is_refused() -> None:
    async with Server() as server:
        with pytest.raises(Refused):
            await connect("127.0.0.1", server.port, "another-token", {"rank": 3})
        assert server.greeted == []


async def test_a_recorded_hello_opens_nothing() -> None:
    recorded: list[bytes] = []

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        recorded.append(await reader.readline())
        writer.close()

    recorder = await asyncio.start_server(record, "127.0.0.1", 0)
    with pytest.raises(Refused):
        await connect("127.0.0.1", recorder.sockets[0].getsockname()[1], TOKEN, {"rank": 3})
    recorder.close()
    assert TOKEN.encode() not in recorded[0]
    async with Server() as server:
        answers = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(recorded[0])
            channel = Channel(reader, writer)
            answers.append(await asyncio.wait_for(channel.receive(), 5))
            channel.abort()
        # The recorder could have spoken once in its sender's place; the second time is too late.
        assert answers[1] is None
        assert len(server.greeted) == 1


async def test_an_impostor_on_the_coordinators_port_is_recognized() -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(json.dumps({"proof": "0" * 64}).encode() + b"\n")

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    with pytest.raises(Refused, match="not the coordinator of this attempt"):
        await connect("127.0.0.1", server.sockets[0].getsockname()[1], TOKEN, {"rank": 3})
    server.close()
