"""What a job of small programs keeps to itself, and what reaches it; `test_every_role.py` has the same for the real
ones, with their ports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import scans
import secrecy
from slurm_jobs import FOREVER, SlurmJob, service, task

Submit = Callable[..., SlurmJob]


def test_secrets_of_a_job_stand_in_its_files_and_environments_alone(
    submit: Submit, planted: dict[str, str], shared: Path
) -> None:
    shared.chmod(0o755)
    code = "import os; print('planted' if os.environ['JUDGE_KEY'] else '', 'OF_THE_SHELL' in os.environ, flush=True)"
    named = ("WANDB_API_KEY", "HF_TOKEN", "JUDGE_KEY")
    run = submit([service("server", FOREVER)], [task("rank-0", f"{code}\n{FOREVER}")], secrets=named)
    run.all_started()
    log = run.attempt() / "logs" / "train-0-rank-0.log"
    run.until(lambda: log.exists() and "planted False" in log.read_text())
    words = secrecy.with_the_attempts(run, planted)
    secrecy.nothing_was_said(run, words)
    secrecy.another_user_finds_nothing(run, words, run.host("rollout-0"))
    seen = {name: processes for name, processes in scans.in_environments(words, run).items() if processes}
    both = {"server", "rank-0"}
    assert seen == {"WANDB_API_KEY": {"rank-0"}, "HF_TOKEN": both, "JUDGE_KEY": both}
    run.job.cancel()
    secrecy.nothing_is_left(run, words)


def test_setup_lines_and_variables_of_the_profile_reach_all_nodes_of_all_components(
    submit: Submit, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    monkeypatch.setenv("OF_THE_SHELL", "1")
    (shared / "modules.sh").write_text('module() { export LOADED="$*"; }\n')
    setup = (
        f"source {shared}/modules.sh",
        "module load cuda/12.8",
        "export SET_UP='on all nodes' PATH=/opt/site:$PATH",
    )
    names = ("LOADED", "SET_UP", "OF_THE_PROFILE", "HF_HUB_OFFLINE", "OF_THE_SHELL")
    code = f"import os; print([os.environ.get(name) for name in {names}], os.environ['PATH'].count('/opt/site'))"
    run = submit(
        [service("server", f"{code}\n{FOREVER}")],
        [task("rank-0", f"{code}\nimport time; time.sleep(2)")],
        [task("rank-1", f"{code}\nimport time; time.sleep(2)")],
        components=({"nodes": 1, "partition": "cpu"}, {"nodes": 2, "partition": "gpu"}),
        setup=setup,
        env={"OF_THE_PROFILE": "it's", "HF_HUB_OFFLINE": "1"},
    )
    run.freed(60)
    assert run.job.state == "COMPLETED", run.story()
    said = {log.name: log.read_text() for log in (run.attempt() / "logs").iterdir() if "supervisor" not in log.name}
    assert len(said) == 3
    wanted = "['load cuda/12.8', 'on all nodes', \"it's\", '1', None] 1"
    assert all(wanted in text for text in said.values()), said
