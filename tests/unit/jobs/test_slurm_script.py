from __future__ import annotations

from pathlib import Path

from job_plans import plan, task
from small_project import Project

from hpc_gym.jobs.slurm_script import sbatch_options, srun_options
from hpc_gym.plan.plan import Launch

TWO = ({"nodes": 1, "partition": "cpu"}, {"nodes": 2, "gpus_per_node": 8})


def test_the_batch_script_alone_hears_of_the_time_limit_and_no_login_environment_travels(tmp_path: Path) -> None:
    (options,) = sbatch_options(plan(tmp_path, train=[[task("rank-0", "pass")]], launch=Launch(kind="slurm")))
    assert options["signal"] == "B:USR2@15"
    assert options["export"] == "NONE"
    assert options["open-mode"] == "append"
    assert options["requeue"] is None


def test_every_component_says_how_many_tasks_it_has(tmp_path: Path) -> None:
    launch = Launch(kind="slurm", options={"partition": "gpu", "time": 30}, components=TWO)
    first, second = sbatch_options(plan(tmp_path, [task("a", "")], [[task("b", "")], [task("c", "")]], launch))
    assert (first["partition"], first["nodes"], first["ntasks"]) == ("cpu", "1", "1")
    assert (second["partition"], second["nodes"], second["ntasks"]) == ("gpu", "2", "2")
    assert second["gpus-per-node"] == "8"
    assert "signal" not in second
    assert srun_options(launch, 3)["het-group"] == "0,1"


def test_what_hpc_gym_depends_on_cannot_be_changed_by_a_profile(tmp_path: Path) -> None:
    launch = Launch(
        kind="slurm", options={"kill_on_bad_exit": 1}, srun={"mpi": "pmix", "kill_on_bad_exit": 1, "wait": 9}
    )
    options = srun_options(launch, 3)
    assert (options["mpi"], options["kill-on-bad-exit"], options["wait"]) == ("pmix", "0", "0")
    assert (options["nodes"], options["ntasks"], options["export"]) == ("3", "3", "ALL")


def test_options_of_srun_are_checked_where_they_are_written(project: Project) -> None:
    assert "hpc-gym owns this option of srun" in project.refused("cluster.srun.wait=3")
    assert "'mpi'" in project.refused("cluster.srun.mpii=none")
    launch = project.plan("cluster.srun.mpi=pmix", "cluster.kind=slurm").launch
    assert launch.srun == {"mpi": "pmix"}


def test_the_jobs_of_a_chain_are_not_requeued_as_well(tmp_path: Path) -> None:
    (options,) = sbatch_options(plan(tmp_path, train=[[]], launch=Launch(kind="slurm", chain=2)))
    assert "no-requeue" in options
    assert "requeue" not in options
