"""What a coordinator hears of a supervisor whose connection broke."""

from __future__ import annotations

import asyncio

from hpc_gym.node.channel import Channel, Message, accept
from hpc_gym.node.link import Link
from hpc_gym.plan.plan import Supervision

TOKEN = "the-token"


async def test_after_a_broken_connection_what_the_coordinator_must_know_is_said_again_and_nothing_else() -> None:
    connections: list[Channel] = []
    heard: list[list[Message]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (accepted := await accept(reader, writer, TOKEN, set())) is None:
            return
        connections.append(accepted[0])
        mine: list[Message] = []
        heard.append(mine)
        while (message := await accepted[0].receive()) is not None:
            if message["type"] != "heartbeat":
                mine.append(message)

    async def until(connection: int, count: int) -> None:
        async with asyncio.timeout(10):
            while len(heard) <= connection or len(heard[connection]) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = Link("127.0.0.1", port, TOKEN, {"rank": 1}, Supervision(), lambda message: None)
    endpoints: Message = {"type": "endpoints", "endpoints": {}}
    link.send(endpoints)
    running = asyncio.create_task(link.run())
    await until(0, 1)
    ended: Message = {"type": "ended", "process": "rank-0", "exit_code": 0}
    for message in (
        {"type": "saving", "process": "rank-0", "saving": True},
        {"type": "event", "event": {}},
        {"type": "saving", "process": "rank-0", "saving": False},
        ended,
    ):
        link.send(message)
    await until(0, 5)
    connections[0].abort()
    await until(1, 3)
    await asyncio.sleep(0.1)
    assert heard[1] == [endpoints, {"type": "saving", "process": "rank-0", "saving": False}, ended]
    running.cancel()
    server.close()
