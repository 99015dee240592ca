"""Five unmodified environments of NeMo Gym in one job on the real Slurm, with every role on nodes of its own: the
judge's vLLM, NeMo Gym on a node of another partition, the policy's vLLM, and DeepSpeed over two training nodes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import scans
import secrecy
from cluster import Cluster
from slurm_jobs import SlurmJob

import hpc_gym
from hpc_gym import submit
from hpc_gym.runtimes.build import build
from hpc_gym.runtimes.spec import spec_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
ENVIRONMENTS = {"workplace_assistant", "reasoning_gym", "mcqa", "math_with_judge", "equivalence_llm_judge"}
PROCESSES = {"vllm-0", "rollout-server", "judge", "judge-server", "gym", "environment-server", "rank-0", "rank-1"}
ROLLOUTS = 32
START_S = 300.0
"""Until something of this job is there, on a machine with two cores that others use too; all of it takes twice that."""


def made_models(folder: Path) -> Path:
    """The folder with `policy` and `judge`."""
    build(["gym", "train-cpu", "inference-cpu"])
    (folder / "code").mkdir()
    (folder / "code" / "hpc_gym").symlink_to(Path(hpc_gym.__file__).parent)
    packages = next(spec_of("gym").python.parents[1].glob("lib/python3.*/site-packages"))
    program = [str(spec_of("train-cpu").python), str(HERE / "small_models.py")]
    environment = os.environ | {"PYTHONPATH": str(folder / "code"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*program, str(folder), str(packages)], check=True, env=environment, timeout=300)
    return folder


@pytest.fixture
def run(slurm_cluster: Cluster, shared: Path, planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> SlurmJob:
    """The job, which goes on until it is cancelled."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    models = made_models(Path(tempfile.mkdtemp(dir=slurm_cluster.shared)))
    shared.chmod(0o755)
    wanted = [f"cluster.runs_dir={shared}", f"vars.models={models}"]
    return SlurmJob(submit(str(HERE / "every_role.yaml"), wanted, cluster="slurm-test"), slurm_cluster)


def test_five_environments_train_with_every_role_on_its_own_nodes_which_keep_their_secrets(
    run: SlurmJob, planted: dict[str, str]
) -> None:
    run.all_started()
    run.until(lambda: len(rows(run)) >= 3 or run.events("outcome"), 2 * START_S)
    assert not run.events("outcome"), run.story()
    assert [node.component for node in run.plan.nodes] == [0, 1, 2, 3, 3]
    assert run.host("environment-0") == "node1"
    assert len({run.host(node.name) for node in run.plan.nodes}) == 5
    assert [node for node, folder in run.private_dirs().items() if (folder / "judge.sock").exists()] == ["judge-0"]

    words = secrecy.with_the_attempts(run, planted)
    secrecy.nothing_was_said(run, words)
    who_has_them(run, words)
    secrecy.only_documented_ports_answer(run)
    for node in ("rollout-0", "environment-0", "train-0"):
        secrecy.another_user_finds_nothing(run, words, run.host(node))
    assert not [event for event in run.events() if event["event"] in ("exited", "restarting", "failed")]

    killed = run.kill("judge-0", "judge")
    secrecy.what_is_on_loopback_wants_a_token_or_is_nemo_gym(run, "environment-0")
    run.until(lambda: len(run.events("ready", "judge")) == 2, START_S)
    run.until(lambda: len(rows(run, after=run.events("ready", "judge")[1]["time"])) >= 1, START_S)
    assert [event["process"] for event in run.events("restarting")] == ["judge"]
    run.figure("the judge's vLLM killed: trains again", rows(run)[-1]["time"] - killed, START_S)

    run.job.cancel()
    assert run.job.state == "CANCELLED"
    assert run.left() == {}
    secrecy.nothing_is_left(run, words)
    assert list(run.run_dir.glob("wandb/offline-run-*/*.wandb"))
    all_environments_were_trained_on(run)


def rows(run: SlurmJob, after: float = 0.0) -> list[dict[str, Any]]:
    """The steps that began after a moment."""
    path = run.run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in found if row["time"] - row["step_seconds"] > after]


def who_has_them(run: SlurmJob, words: Mapping[str, str]) -> None:
    """The secrets that the experiment names are in environments, and nothing else of the shell."""
    seen = {name: processes for name, processes in scans.in_environments(words, run).items() if processes}
    assert set(seen) == {"WANDB_API_KEY", "HF_TOKEN", "JUDGE_KEY"}
    assert seen["WANDB_API_KEY"] == {"rank-0", "rank-1"}
    environments = scans.variables_of(run)
    assert set(environments) >= PROCESSES
    assert all(any(b"HF_HUB_OFFLINE=1" in data for data in each) for each in environments.values())


def all_environments_were_trained_on(run: SlurmJob) -> None:
    """Token-exact, and no rollout failed, though the judge's vLLM was killed."""
    steps = rows(run)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    for row in steps:
        assert {name.removeprefix("reward/") for name in row if name.startswith("reward/")} == ENVIRONMENTS
        assert (row["rollouts"], row["failed"]) == (ROLLOUTS, 0)
        assert row["logp_diff"] < 1e-4
        assert row["logp_unknown"] == 0
        # Of the five only the office has tools, and so a second turn.
        assert row["turns"] > row["rollouts"]
    # Only its judge can say that any answer is right there.
    assert any(row["reward/equivalence_llm_judge"] > 0 for row in steps)
    log = (run.attempt() / "logs" / "environment-0-environment-server.log").read_text()
    (answered,) = re.findall(r"the judge has answered (\d+) questions", log)
    # Each answer to such a question once; of mathematics only what no symbols prove.
    assert int(answered) > sum(row["rollouts"] for row in steps) // 4
