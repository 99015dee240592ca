"""The secrets of an attempt: the bearer token of its servers and the secret environment variables of its processes.

They travel in one file, mode 0600 in a 0700 folder, `{"token": ..., "env": {NAME: value}}`; never in argv, plan or log.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Secrets:
    """`token` opens the rollout servers' public port and the coordinator's; `env` is set for every process."""

    token: str = field(repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


def read_secrets(path: str | Path) -> Secrets:
    """The secrets in the file at `path`.

    Raises PermissionError when others may read the file, ValueError when it is not what `write_secrets` writes.
    """
    path = Path(path)
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise PermissionError(f"{path} can be read by others: it holds secrets and must have mode 0600")
        try:
            data = json.load(file)
            token, env = data["token"], data["env"]
        except (ValueError, KeyError, TypeError):
            # Without the cause: its text could quote the file.
            raise ValueError(f"{path} is no secrets file of hpc-gym (keys: token, env)") from None
    if not isinstance(token, str) or not token or not isinstance(env, dict):
        raise ValueError(f"{path} is no secrets file of hpc-gym: 'token' is a text that is not empty, 'env' an object")
    return Secrets(token=token, env={str(name): str(value) for name, value in env.items()})


def write_secrets(path: str | Path, secrets: Secrets) -> None:
    """Creates the file at `path`, never readable by others at any moment. Raises FileExistsError when it is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"token": secrets.token, "env": dict(secrets.env)}, file)
        file.flush()
        os.fsync(file.fileno())
