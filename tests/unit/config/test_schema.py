"""The typed experiment: what is wrong is told with file, line, key, value and what is allowed, all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.config.compose import compose
from hpc_gym.config.problems import problem_line
from hpc_gym.config.schema import Experiment
from hpc_gym.config.validate import validate

GOOD = """\
name: good
model: {path: /model}
environments:
  counter: {config_paths: [environments/counter/config.yaml]}
data:
  train:
    - {environment: counter, path: rows.jsonl}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    return tmp_path


def told(text: str, folder: Path, *overrides: str) -> list[str]:
    """The problems of an experiment that says `text` on top of a good one."""
    (folder / "top.yaml").write_text("extends: [./good.yaml]\n" + text)
    composed = compose("top.yaml", overrides)
    experiment, problems = validate(composed)
    assert (experiment is None) == bool(problems)
    return [problem_line(problem, composed.provenance) for problem in problems]


def test_a_short_file_is_enough(folder: Path) -> None:
    experiment, problems = validate(compose("good.yaml"))
    assert problems == []
    assert isinstance(experiment, Experiment)
    assert experiment.nodes.train == 1
    assert experiment.data.train[0].weight == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nods: {train: 2}\n", "top.yaml:2: nods: unknown key; did you mean 'nodes'?"),
        ("nodes:\n  trian: 2\n", "top.yaml:3: nodes.trian: unknown key; did you mean 'train'?"),
        ("rollouts: {temprature: 1}\n", "top.yaml:2: rollouts.temprature: unknown key; did you mean 'temperature'?"),
        (
            "environments:\n  counter:\n    timeout: 5\n",
            "top.yaml:4: environments.counter.timeout: unknown key; did you mean 'timeout_s'?",
        ),
        (
            "data:\n  train:\n    - environment: counter\n      paht: x\n      path: y\n",
            "top.yaml:5: data.train.0.paht: unknown key; did you mean 'path'?",
        ),
        (
            "tracking:\n  wandb:\n    project: x\n    moda: offline\n",
            "top.yaml:5: tracking.wandb.moda: unknown key; did you mean 'mode'?",
        ),
        ("weights: {zzz: 1}\n", "top.yaml:2: weights.zzz: unknown key; allowed: transfer."),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_valid_one(folder: Path, text: str, says: str) -> None:
    assert told(text, folder) == [says]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nodes: {train: two}\n", "top.yaml:2: nodes.train: must be a whole number, not the text 'two'."),
        ("nodes: {train: 1.5}\n", "top.yaml:2: nodes.train: must be a whole number, not 1.5."),
        ("nodes: {train: true}\n", "top.yaml:2: nodes.train: must be a whole number, not true."),
        ("nodes: {train: 0}\n", "top.yaml:2: nodes.train: 0 is not allowed; it must be greater than or equal to 1."),
        (
            "nodes: {train: 100000000}\n",
            "top.yaml:2: nodes.train: 100000000 is not allowed; it must be less than or equal to 10000.",
        ),
        (
            "seed: 99999999999999999999\n",
            "top.yaml:2: seed: 99999999999999999999 is not allowed; it must be less than 4294967296.",
        ),
        ("rollouts: {temperature: .nan}\n", "top.yaml:2: rollouts.temperature: must be a finite number, not nan."),
        ("supervision: {alive_s: .inf}\n", "top.yaml:2: supervision.alive_s: must be a finite number, not inf."),
        ("on_policy_tolerance: -.inf\n", "top.yaml:2: on_policy_tolerance: must be a finite number, not -inf."),
        ("nodes: 3\n", "top.yaml:2: nodes: must be a section of `key: value` pairs, not 3."),
        ("rollouts: {temperature: hot}\n", "top.yaml:2: rollouts.temperature: must be a number, not the text 'hot'."),
        (
            "rollouts: {top_p: 1.5}\n",
            "top.yaml:2: rollouts.top_p: 1.5 is not allowed; it must be less than or equal to 1.",
        ),
        (
            "rollouts: {tool_choice: sometimes}\n",
            "top.yaml:2: rollouts.tool_choice: 'sometimes' is not allowed; allowed: 'auto', 'required' or 'none'.",
        ),
        (
            "cluster: {setup: module load x}\n",
            "top.yaml:2: cluster.setup: must be a list, not the text 'module load x'.",
        ),
        ("model: {path: 5}\n", 'top.yaml:2: model.path: must be text, not 5: write it in quotes, "5".'),
        (
            "data: {train: []}\n",
            "top.yaml:2: data.train: must not be empty: list at least one {environment: NAME, path: FILE.jsonl}.",
        ),
        ("environments: null\n", "top.yaml:2: environments: must be a section of `key: value` pairs, not null."),
        (
            "tracking: {wandb: {mode: offline}}\n",
            "top.yaml:2: tracking.wandb.project: is missing: it must be set.",
        ),
        ("cluster: {env: {A: 1}}\n", 'top.yaml:2: cluster.env.A: must be text, not 1: write it in quotes, "1".'),
        (
            "name: a/b\n",
            "top.yaml:2: name: 'a/b': must be usable as a folder's name: letters, digits, '.', '_' and '-', at most "
            "100, "
            "starting with a letter or digit.",
        ),
        (
            "name: latest\n",
            "top.yaml:2: name: 'latest': would be taken for another run: 'latest' is the newest one, and a number is a "
            "job's id.",
        ),
        (
            "name: '4711'\n",
            "top.yaml:2: name: '4711': would be taken for another run: 'latest' is the newest one, and a number is a "
            "job's id.",
        ),
    ],
)
def test_wrong_values_are_refused_with_what_is_allowed(folder: Path, text: str, says: str) -> None:
    assert told(text, folder) == [says]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "cluster: {slurm: {partitoin: gpu}}\n",
            "top.yaml:2: cluster.slurm.partitoin: sbatch has no such option; did you mean 'partition'?",
        ),
        (
            "cluster: {slurm: {train: {time: a day}}}\n",
            "top.yaml:2: cluster.slurm.train.time: 'a day' is no time as sbatch takes it; allowed: minutes, or as "
            "12:00:00 or 2-00:00:00 (days-hours:minutes:seconds).",
        ),
        (
            "cluster: {slurm: {time: -5}}\n",
            "top.yaml:2: cluster.slurm.time: -5 is no time as sbatch takes it; allowed: minutes, or as 12:00:00 or "
            "2-00:00:00 (days-hours:minutes:seconds).",
        ),
        (
            "cluster: {slurm: {nodes: 4}}\n",
            "top.yaml:2: cluster.slurm.nodes: hpc-gym owns this directive: hpc-gym counts them: set nodes.rollout "
            "and nodes.train.",
        ),
        (
            "cluster: {slurm: {gpus: 16}}\n",
            "top.yaml:2: cluster.slurm.gpus: hpc-gym owns this directive: Slurm may divide a total unevenly, and all "
            "nodes of a role need the same: set gpus-per-node.",
        ),
        (
            "cluster: {slurm: {train: {job_name: x}}}\n",
            "top.yaml:2: cluster.slurm.train.job_name: hpc-gym owns this directive: the job is called like the "
            "experiment: set name.",
        ),
        (
            "cluster: {slurm: {time: [1, 2]}}\n",
            "top.yaml:2: cluster.slurm.time: must be text, a whole number, a number or true or false, not a list.",
        ),
    ],
)
def test_directives_of_slurm_are_checked(folder: Path, text: str, says: str) -> None:
    assert told(text, folder) == [says]


def test_directives_of_slurm_pass_in_either_spelling(folder: Path) -> None:
    text = "partition: gpu, gpus-per-node: 8, cpus_per_task: 4, time: '1:00:00', train: {constraint: a}"
    assert told(f"cluster: {{slurm: {{{text}}}}}\n", folder) == []


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("account: 0123", "83"),
        ("account: 12e3", "12000.0"),
        ("reservation: 2024_11_05", "20241105"),
        ("qos: no", "false"),
        ("partition: 7", "7"),
        ("constraint: on", "true"),
        ("wckey: 1", "1"),
    ],
)
def test_names_that_yaml_reads_as_something_else_want_quotes(folder: Path, written: str, read: str) -> None:
    option, _, value = written.partition(": ")
    for text, key in ((written, option), (f"train: {{{written}}}", f"train.{option}")):
        says = f"top.yaml:2: cluster.slurm.{key}: must be text, but YAML reads this as {read}: write it in quotes."
        assert told(f"cluster: {{slurm: {{{text}}}}}\n", folder) == [says]
    assert told(f"cluster: {{slurm: {{{option}: '{value}'}}}}\n", folder) == []
    assert told(f"cluster: {{slurm: {{{option}: null}}}}\n", folder) == []


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "empty.yaml").write_text("name: x\n")
    composed = compose("empty.yaml")
    _, problems = validate(composed)
    lines = [problem_line(problem, composed.provenance) for problem in problems]
    assert any("model: is missing: extend models/NAME" in line for line in lines)
    assert any("environments: must not be empty" in line for line in lines)
    assert any("data.train: must not be empty" in line for line in lines)


def test_an_override_is_named_as_it_was_typed(folder: Path) -> None:
    assert told("", folder, "nodes.train=many") == [
        "override 'nodes.train=many': nodes.train: must be a whole number, not the text 'many'."
    ]


def test_several_problems_are_told_together(folder: Path) -> None:
    assert len(told("nods: 1\nnodes: {train: x}\nseed: -1\ncluster: {kind: pbs, slurm: {nodes: 1}}\n", folder)) == 5


def test_the_experiment_cannot_be_changed_afterwards(folder: Path) -> None:
    experiment, _ = validate(compose("good.yaml"))
    assert experiment is not None
    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 5  # type: ignore[misc]
