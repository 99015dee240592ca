"""What vLLM itself has in its dev mode only: a question that its engine must answer. Runs inside `vllm serve`
(`--middleware hpc_gym.rollout.engine_health.EngineHealth`, written against vLLM 0.32), so it imports nothing of ours.
"""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/engine_health"


class EngineHealth:
    """Answers `GET /engine_health` with 200 once the engine has answered: `/health` is content as long as the engine's
    process lives, however it hangs. Requests that wait for their turn in the engine do not delay it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            await scope["app"].state.engine_client.is_sleeping()
            await Response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)
