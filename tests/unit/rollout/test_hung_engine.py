"""vLLM whose engine hangs goes on saying that it is healthy: what it does not do tells."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from hpc_gym.protocol.messages import WeightsUpdate
from hpc_gym.rollout import replicas, weights

ANSWERS = {"/health": b"", "/weight_info": b'{"weight_version": "default"}', "/get_world_size": b'{"world_size": 1}'}


class Vllm:
    """As much of a vLLM as is asked here."""

    def __init__(self) -> None:
        self.engine = asyncio.Event()
        """Cleared while it hangs."""
        self.engine.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().partition("?")[0]
        if path != "/health":
            await self.engine.wait()
        body = ANSWERS.get(path, b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()


async def _story(folder: Path) -> list[tuple[bool, str]]:
    vllm, told = Vllm(), []
    found = replicas.Replicas(str(folder), 1)
    replica = found.all[0]
    updating = weights.Weights(found)

    async def look(failure: str = "") -> None:
        await replica.look()
        told.append((replica.up, failure))

    async with await asyncio.start_unix_server(vllm.answer, folder / "vllm-0.sock"):
        await look()
        vllm.engine.clear()
        await look()
        update = WeightsUpdate(version=1, incarnations=[replica.incarnation], update_info=[msgspec.Raw(b"{}")])
        with pytest.raises(weights.WeightsFailed) as failed:
            await updating.update(update)
        await look(str(failed.value))
        vllm.engine.set()
        await look()
        await found.close()
    return told


def test_an_engine_that_takes_no_weights_is_not_there_until_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "STEP_S", 0.4)
    monkeypatch.setattr(replicas, "ASK_S", 3.0)
    why = "vllm-0 failed at /pause: vllm-0 did not answer /pause?mode=keep within 0 s"
    assert asyncio.run(_story(tmp_path)) == [(True, ""), (True, ""), (False, why), (True, "")]
