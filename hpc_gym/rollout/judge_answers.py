"""What a judge's answers mean, and what to tell people of those that are none: which key of theirs to change."""

from __future__ import annotations

import aiohttp
import msgspec

from hpc_gym.plan.plan import Judge

KEY_REFUSED = (401, 403)
THERE = (400, 429)
"""Address, key and model are right, though the question of one token was refused: an API of other words, or a limit of
requests."""
NO_VERDICT = 424
"""What NeMo Gym (0.4.0) neither asks again after, nor takes for an answer."""


def refusal(judge: Judge, name: str, path: str, status: int, body: bytes) -> str:
    """Why an answer to `path` is none, as a sentence about `name`; empty when it is one."""
    words = f"{body[:300].decode(errors='replace')!r}"
    outside = judge.url is not None
    if status == 200:
        if _is_answer(path, body):
            return ""
        hint = "; judge.url must be the address of an API, as https://HOST/v1" if outside else ""
        return f"{name}: its answer to {path} is none of an OpenAI-compatible server: {words}{hint}"
    if status in KEY_REFUSED:
        if judge.api_key_env is None:
            return f"{name} wants a key ({status}): name the environment variable that holds it in judge.api_key_env"
        return f"{name} refused the key in {judge.api_key_env} ({status}): judge.api_key_env must name the right one"
    if status == 400:
        return f"{name} refused the question: {words}" + (_model(judge) if outside else "")
    said = f"{name} answered {path} with {status}: {words}"
    if outside and is_permanent(status):
        return f"{said}; judge.url must be the address of its API up to /v1, and it must have the model{_model(judge)}"
    return said


def _model(judge: Judge) -> str:
    return f" '{judge.model_name}' (judge.model_name)"


def is_permanent(status: int) -> bool:
    """Whether it answers so until somebody changes something: all but what a busy or starting server says."""
    return status == 200 or (status < 500 and status not in (400, 408, 409, 425, 429))


def passed_on(status: int) -> int:
    """The status for NeMo Gym, which takes 400 for a verdict, and a redirect for an answer."""
    return NO_VERDICT if status < 400 or status == 400 else status


def why(error: Exception) -> str:
    """What went wrong on the way, without the words of the error, in which an address may stand."""
    kinds = {
        aiohttp.ClientConnectorDNSError: "its name is not known",
        aiohttp.ClientSSLError: "its certificate is not accepted",
        aiohttp.ClientProxyConnectionError: "the proxy takes no connection",
        aiohttp.ClientConnectorError: "it takes no connection",
        aiohttp.ServerDisconnectedError: "it broke the connection",
        aiohttp.ClientPayloadError: "it broke the connection",
        aiohttp.ClientOSError: "it broke the connection",
        TimeoutError: "no answer in time",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), type(error).__name__)


def _is_answer(path: str, body: bytes) -> bool:
    """Whether a body holds what NeMo Gym reads out of an answer to that path."""
    wanted = {"chat/completions": "choices", "completions": "choices", "responses": "output"}.get(path)
    if wanted is None:
        return True
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        return False
    return bytes(fields.get(wanted, b"")).lstrip()[:1] == b"["
