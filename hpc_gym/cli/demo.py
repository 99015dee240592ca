"""`hpc-gym demo`: runtimes, a model made on the spot, a job to its end, and what it reached."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_gym.cli.arguments import Json, Overrides
from hpc_gym.errors import UserError

if TYPE_CHECKING:
    from hpc_gym.jobs.job import HpcgymJob
    from hpc_gym.jobs.report import Report

HELD_OUT = 200
"""As `hpc_gym.data.demo_rows.HELD_OUT`, which is imported late."""


def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows, the model and the training.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: the experiment's.")] = None,
    eval_rows: Annotated[
        int, typer.Option(min=2, max=HELD_OUT, help="Held-out rows per environment to evaluate on.")
    ] = HELD_OUT,
    run_name: Annotated[
        str | None, typer.Option(help="Name of the run; default: demo, demo-2, ... whichever is free.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small model on two NeMo Gym environments, on this machine, with every real part.

    Builds the runtimes and makes the model where they are missing, runs the job to its end, and reports what it
    reached: exit code 0 when the job and both evaluations ran, whatever the gain. Ctrl-C stops everything.

    \b
    hpc-gym demo
    hpc-gym demo --seed 7 --steps 60
    hpc-gym demo --run-name careful grpo.learning_rate=5e-5
    """
    # A terminated demo stops its job in good order, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    changes = [*(overrides or ()), *([] if steps is None else [f"grpo.max_steps={steps}"])]
    _refuse_wrong(run_name, changes)
    if run_name is not None:
        _refuse_taken(run_name, changes)
    began = time.monotonic()
    folder_overrides = _prepare(seed, eval_rows)
    prepared = time.monotonic() - began
    job = _submit(run_name, [*folder_overrides, *changes])
    state = _watch(job)
    if state != "COMPLETED":
        raise typer.Exit(1)
    _report(job.run_dir, prepared, as_json)


def _prepare(seed: int, eval_rows: int) -> list[str]:
    """Builds the runtimes and, beside those that take longer, the model; returns the experiment's overrides."""
    from hpc_gym.cli.demo_view import preparation_view
    from hpc_gym.jobs.demo_inputs import TRAIN_RUNTIME, DemoInputs, ModelMaking
    from hpc_gym.runtimes.build import build
    from hpc_gym.runtimes.install import Event
    from hpc_gym.runtimes.spec import default_names

    inputs = DemoInputs.of(seed)
    names = default_names("cpu")
    with preparation_view(names) as view:
        making = ModelMaking(inputs, threads=min(4, os.cpu_count() or 1), progress=view.model)

        def built(event: Event) -> None:
            view.runtime(event)
            if event.runtime == TRAIN_RUNTIME and event.stage == "ready":
                making.start()

        try:
            build(names, built)
            making.wait()
            inputs.write_rows()
            return inputs.overrides(eval_rows)
        except OSError as error:
            making.cancel()
            raise UserError(
                f"the demo's model and rows can't be written to {inputs.folder}: {error.strerror or error}. "
                "Make room there, or set HPC_GYM_CACHE to another folder."
            ) from error
        except BaseException:
            making.cancel()
            raise


def _runs_dir(overrides: Sequence[str]) -> Path:
    from hpc_gym.config.compose import compose

    composed = compose("demo", overrides)
    named = Path(composed.tree["cluster"]["runs_dir"]).expanduser()
    return (composed.folder_of(("cluster", "runs_dir")) / named).resolve()


def _refuse_wrong(run_name: str | None, changes: Sequence[str]) -> None:
    """Says before anything takes time what is wrong besides the model and the rows, which are made later."""
    import json

    from hpc_gym.config.problems import refuse
    from hpc_gym.plan.resolve import NotReadyError, resolve

    named = [] if run_name is None else [f"name={json.dumps(run_name)}"]
    try:
        resolve("demo", [*changes, *named])
    except NotReadyError as error:
        refuse([each for each in error.problems if each.path[0] not in ("model", "data")], error.described.provenance)


def _refuse_taken(name: str, overrides: Sequence[str]) -> None:
    """Said before anything takes time; the submit checks it again."""
    taken = _runs_dir(overrides) / name
    if taken.exists():
        raise UserError(f"the run '{name}' exists: {taken}. Choose another --run-name, or remove that directory.")


def _submit(name: str | None, overrides: Sequence[str]) -> HpcgymJob:
    import hpc_gym

    if name is not None:
        return hpc_gym.submit("demo", overrides, name=name)
    runs, number = _runs_dir(overrides), 1
    while True:
        free = "demo" if number == 1 else f"demo-{number}"
        if not (runs / free).exists():
            return hpc_gym.submit("demo", overrides, name=free)
        number += 1


def _watch(job: HpcgymJob) -> str:
    """Shows the job to its end and returns its state; an interrupt stops the job."""
    from hpc_gym.cli.live import watch_job
    from hpc_gym.jobs.cancellation import cancel

    try:
        return watch_job(job.record).state
    except KeyboardInterrupt:
        sys.stderr.write("\nStopping the job ...\n")
        sys.stderr.write(f"{cancel(job.record).sentence}\n")
        raise typer.Exit(130) from None


def _report(run_dir: Path, prepared: float, as_json: bool) -> None:
    from hpc_gym.jobs.report import draw_curve, report

    found = report(run_dir)
    curve = draw_curve(run_dir, run_dir / "reward-curve.png")
    _save(run_dir, found)
    if as_json:
        sys.stdout.write((run_dir / "report.json").read_text())
        return
    from hpc_gym.cli.demo_view import print_report

    print_report(found, curve, prepared)


def _save(run_dir: Path, found: Report) -> None:
    import dataclasses
    import json

    text = json.dumps(dataclasses.asdict(found), indent=1, default=str)
    (run_dir / "report.json").write_text(text + "\n")
