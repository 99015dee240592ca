"""hpc-gym: reinforcement-learning post-training of language models as HPC jobs.

    job = hpc_gym.submit("workplace-sudoku", overrides=["grpo.max_steps=100"], cluster="local")
    job.result()

Importing the package costs nothing: what it offers is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_gym.errors import UserError

if TYPE_CHECKING:
    from hpc_gym.jobs.job import HpcgymJob
    from hpc_gym.jobs.submit import run, submit

__all__ = ["HpcgymJob", "UserError", "run", "submit"]

_HOMES = {"HpcgymJob": "hpc_gym.jobs.job", "run": "hpc_gym.jobs.submit", "submit": "hpc_gym.jobs.submit"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hpc_gym' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
