"""Container engines in a job: stand-ins that record their arguments and run the program on the node itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_jobs import FOREVER, SlurmJob, service, task

from hpc_gym.plan.plan import Runtime

Submit = Callable[..., SlurmJob]

APPTAINER = """#!/bin/bash
echo "$*" >> {record}
shift
while [[ $1 == --* ]]; do
    case $1 in --nv) shift ;; *) shift 2 ;; esac
done
shift
exec "$@"
"""
# The real srun, without what pyxis would add to it.
SRUN = """#!/bin/bash
arguments=()
for each in "$@"; do
    case $each in
        --container-image=*) echo "$*" >> {record} ;;
        --container-* | --no-container-*) ;;
        *) arguments+=("$each") ;;
    esac
done
exec /usr/bin/srun "${{arguments[@]}}"
"""
ENDS_WELL = "import os, time; print(os.environ['HPC_GYM_NODE'], os.environ['PYTHONPATH']); time.sleep(2)"
COMPONENTS = ({"nodes": 1, "partition": "gpu"}, {"nodes": 2, "partition": "gpu", "gpus_per_node": 2})


@pytest.fixture
def engine(shared: Path) -> Callable[[str], dict[str, object]]:
    """What a job needs to find the stand-in of an engine."""

    def of(kind: str) -> dict[str, object]:
        name, text = {"apptainer": ("apptainer", APPTAINER), "pyxis": ("srun", SRUN)}[kind]
        (shared / "bin").mkdir()
        program = shared / "bin" / name
        program.write_text(text.format(record=shared / "record"))
        program.chmod(0o755)
        (shared / "image.sif").touch()
        runtime = Runtime("base", kind, str(shared / "image.sif"), sys.executable)  # type: ignore[arg-type]
        return {"runtime": runtime, "setup": (f'export PATH={shared}/bin:"$PATH"',)}

    return of


@pytest.mark.parametrize("components", [(), COMPONENTS], ids=["plain", "heterogeneous"])
@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_job_runs_and_ends_in_containers(
    submit: Submit,
    engine: Callable[[str], dict[str, object]],
    shared: Path,
    kind: str,
    components: tuple[dict[str, object], ...],
) -> None:
    run = submit(
        [service("server", FOREVER)],
        [task("rank-0", ENDS_WELL)],
        [task("rank-1", ENDS_WELL)],
        components=components,
        **engine(kind),
    )
    run.freed(60)
    assert run.job.state == "COMPLETED", run.story()
    assert run.left() == {}
    recorded = (shared / "record").read_text().splitlines()
    assert len(recorded) == 3
    assert all(str(run.run_dir) in line and "image.sif" in line for line in recorded)
    said = (run.attempt() / "logs" / "train-1-rank-1.log").read_text()
    assert f"train-1 {run.run_dir}/code" in said


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_program_that_fails_in_a_container_fails_the_job(
    submit: Submit, engine: Callable[[str], dict[str, object]], kind: str
) -> None:
    fails = "import time; time.sleep(1); raise ValueError('in the container')"
    run = submit([service("server", FOREVER)], [task("rank-0", fails)], **engine(kind))
    run.freed(60)
    assert run.job.state == "FAILED"
    assert "process rank-0 exited with code 1: ValueError: in the container" in run.output().splitlines()[-1]
    assert run.left() == {}
