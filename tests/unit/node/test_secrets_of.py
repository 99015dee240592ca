"""Which of the attempt's secrets a process gets, and what else it is opened by."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

from job_plans import plan, task

from hpc_gym.node.context import NODE_TOKEN, NodeContext
from hpc_gym.node.environment import secrets_of
from hpc_gym.plan.plan import Judge
from hpc_gym.protocol.secrets import Secrets

SECRETS = {"WANDB_API_KEY": "w", "HF_TOKEN": "h", "JUDGE_KEY": "j", "SEARCH_KEY": "s"}


def test_environments_get_neither_the_key_of_wandb_nor_the_judges(tmp_path: Path) -> None:
    wanted = plan(tmp_path, train=[[task("rank-0", "pass")]])
    judge = Judge("judge", 10.0, "https://judge/v1", "JUDGE_KEY")
    wanted = replace(wanted, rollout=replace(wanted.rollout, judge=judge))
    assert secrets_of(wanted, "train", SECRETS) == {"WANDB_API_KEY": "w", "HF_TOKEN": "h", "SEARCH_KEY": "s"}
    for role in ("rollout", "environment", "judge"):
        assert secrets_of(wanted, role, SECRETS) == {"HF_TOKEN": "h", "SEARCH_KEY": "s"}


def test_a_node_has_a_token_of_its_own_that_tells_nothing_of_the_attempts(tmp_path: Path) -> None:
    wanted = plan(tmp_path / "run", train=[[task("a", "pass")], [task("b", "pass")]])
    tokens = set()
    for node in wanted.nodes:
        context = NodeContext(wanted, node, 1, ("127.0.0.1", 1), Secrets(f"attempt of {tmp_path}"), "127.0.0.1", "lo")
        context.make_private_dir()
        try:
            file = context.private_dir / NODE_TOKEN
            assert stat.S_IMODE(context.private_dir.stat().st_mode) == 0o700
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            tokens.add(file.read_text())
        finally:
            (context.private_dir / NODE_TOKEN).unlink()
            context.private_dir.rmdir()
    assert len(tokens) == 2
    assert all(len(token) == 64 and "attempt" not in token for token in tokens)
