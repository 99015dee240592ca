"""Whether the judge outside (`judge.url`) answers, as seen from the machine that checks."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import IO, Any

ANSWER_WITHIN_S = 5.0


class NotAnswering(Exception):
    """Nobody answers there; the text says what happened."""


class KeyRefused(Exception):
    """Somebody answers and does not accept the key."""


def models_at(url: str, key: str) -> list[str] | None:
    """The models that an OpenAI-compatible address lists; None where it answers and lists none.

    Raises NotAnswering and KeyRefused.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(urllib.request.Request(f"{url}/models", headers=headers), timeout=ANSWER_WITHIN_S) as answer:
            listed = json.loads(answer.read())
        return [str(each["id"]) for each in listed["data"]]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise KeyRefused from None
        return None
    except (ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise NotAnswering(str(getattr(error, "reason", "") or error)) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    # The key is for the address that the experiment names.
    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], *rest: Any) -> None:
        return None
