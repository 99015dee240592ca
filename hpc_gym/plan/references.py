"""Looks up what an experiment names outside itself: runtimes and their images, the model, NeMo Gym's configurations,
dataset files.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_gym.config.compose import Composed
from hpc_gym.config.problems import Problem
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.schema import Experiment, Rows, WeightedRows
from hpc_gym.data.rows import check_rows
from hpc_gym.errors import UserError
from hpc_gym.plan.batch import Batch
from hpc_gym.plan.checks import default_hub_cache, model_source, refuse_absent_hub_model, refuse_without_chat_template
from hpc_gym.plan.nemo_gym import JUDGE, Gym, Served, clashes, data_file, serve
from hpc_gym.plan.plan import DataSource, Runtime
from hpc_gym.plan.processes import BASE, Names
from hpc_gym.runtimes.spec import is_runtime, spec_of


class References:
    """`problems` is what was wrong; `paths` maps keys that name files to what they mean, absolute."""

    def __init__(
        self, composed: Composed, experiment: Experiment, earlier: Mapping[str, Runtime] | None = None
    ) -> None:
        self.composed = composed
        self.experiment = experiment
        self.earlier = earlier or {}
        self.problems: list[Problem] = []
        self.paths: dict[KeyPath, str] = {}

    def runtimes(self, names: Names) -> dict[str, Runtime]:
        """The runtimes of the roles by name, with the base runtime that runs now. An earlier one that is still there is
        kept, wherever it is.
        """
        container = self.experiment.cluster.runtime
        base = Runtime(BASE, "venv", sys.prefix, sys.executable)
        runtimes, images = {BASE: base}, self._images()
        for role, name in (("inference", names.inference), ("gym", names.gym), ("train", names.train)):
            try:
                spec = spec_of(name)
            except UserError as error:
                self.problems.append(Problem(("runtimes", role), f"{error}."))
                runtimes[name] = base
                continue
            image = images.get(role)
            earlier = self.earlier.get(name)
            if image is None and earlier and earlier.kind == container.kind and is_runtime(Path(earlier.root)):
                root, python, lock = earlier.root, earlier.python, earlier.lock
            else:
                root, python, lock = image or str(spec.root), "python" if image else str(spec.python), spec.digest
            runtimes[name] = Runtime(
                name=name,
                kind=container.kind,
                root=root,
                python=python,
                lock=lock,
                modules=tuple(container.modules),
                options=tuple(container.options),
            )
        return runtimes

    def _images(self) -> dict[str, str]:
        """The container images by role; none where no container engine is asked for, whatever the profile lists."""
        container = self.experiment.cluster.runtime
        images: dict[str, str] = {}
        for role, written in container.images.items():
            key: KeyPath = ("cluster", "runtime", "images", role)
            images[role] = self.paths[key] = image_source(written, self.composed.folder_of(key))
        return images if container.kind in ("apptainer", "pyxis") else {}

    def check_saves(self, batch: Batch | None) -> None:
        every = self.experiment.checkpoints.every
        if batch and every % batch.steps_per_cycle:
            self.problems.append(
                Problem(
                    ("checkpoints", "every"),
                    f"{every} must be a multiple of {batch.steps_per_cycle}, the steps for which a generation batch "
                    "is used: a resume in the middle of one would shift the batches.",
                )
            )

    def judge(self) -> str | None:
        """The judge's model; None where there is none to serve."""
        judge = self.experiment.judge
        if judge is None or judge.model is None:
            return None
        return self._model(("judge", "model"), judge.model, judge.vllm)

    def model(self) -> str:
        return self._model(("model", "path"), self.experiment.model.path, self.experiment.vllm)

    def _model(self, key: tuple[str, str], written: str, vllm: Mapping[str, object]) -> str:
        try:
            model = model_source(written, self.composed.folder_of(key))
            if self.experiment.cluster.kind == "local":
                # The job runs where this does, so what the cache lacks now it will lack then.
                refuse_absent_hub_model(model, default_hub_cache(), ".".join(key))
            refuse_without_chat_template(model, vllm, "judge.vllm" if key[0] == "judge" else "vllm")
        except UserError as error:
            self.problems.append(Problem(key, str(error)))
            return ""
        self.paths[key] = model
        return model

    def environments(self) -> dict[str, Served]:
        served = {}
        for name, environment in self.experiment.environments.items():
            each, problems = serve(name, environment, self.composed, self.experiment.judge is not None)
            self.problems += problems
            if each is not None:
                served[name] = each
                for index, path in enumerate(each.config_paths):
                    self.paths["environments", name, "config_paths", index] = path
        self.problems += clashes(served)
        self._check_judge(served)
        return served

    def _check_judge(self, served: Mapping[str, Served]) -> None:
        """A judge takes GPUs: somebody should ask it."""
        if self.experiment.judge is None or len(served) < len(self.experiment.environments):
            return
        own = (kind for each in served.values() for kind in each.instances.values())
        if not any(each.asks for each in served.values()) and "responses_api_models" not in own:
            self.problems.append(
                Problem(
                    ("judge",),
                    f"no environment asks it: point one at the model server '{JUDGE}' in its config (the shipped "
                    "environments/math_with_judge_judged.yaml shows how), or take this section away.",
                )
            )

    def sources(
        self, gym: Gym, kind: str, sources: Sequence[Rows], served: Mapping[str, Served]
    ) -> tuple[DataSource, ...]:
        found = []
        for index, source in enumerate(sources):
            key: KeyPath = ("data", kind, index, "path")
            try:
                file = data_file(source.path, self.composed.folder_of(key), gym)
                summary = check_rows(file)
            except UserError as error:
                self.problems.append(Problem(key, f"{str(error).rstrip('.')}."))
                continue
            self.paths[key] = str(file)
            self._check_agents(key, file, source.environment, served, summary.first_line)
            weight = source.weight if isinstance(source, WeightedRows) else 1.0
            found.append(DataSource(source.environment, str(file), weight, summary.rows))
        return tuple(found)

    def _check_agents(
        self, key: KeyPath, file: Path, environment: str, served: Mapping[str, Served], agents: Mapping[str, int]
    ) -> None:
        if environment not in served or not served[environment].agent:
            return
        agent = served[environment].agent
        for name, line in agents.items():
            if name == agent:
                continue
            others = [other for other, each in served.items() if each.agent == name]
            hint = (
                f"that agent serves the environment '{others[0]}'"
                if others
                else "no configured environment has that agent"
            )
            self.problems.append(
                Problem(
                    key,
                    f"{file}:{line}: agent_ref names '{name}', but the environment '{environment}' is served by "
                    f"'{agent}'; {hint}.",
                )
            )


def image_source(written: str, folder: Path) -> str:
    """The container image as its engine is told it: the absolute file, or its address in a registry.

    An address has a ':' or a '#' in it (`docker://NAME:TAG`, enroot's `REGISTRY#NAME`); a file with one in its name is
    written as `./NAME`.
    """
    if not written.startswith((".", "/", "~")) and any(mark in written for mark in ":#"):
        return written
    return str((folder / Path(written).expanduser()).resolve())
