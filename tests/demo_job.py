"""The demo's job as tests run it: a few steps, without evaluations."""

from __future__ import annotations

import os
from pathlib import Path

from hpc_gym.jobs.demo_inputs import DemoInputs, ModelMaking
from hpc_gym.runtimes.build import build
from hpc_gym.runtimes.spec import default_names


def small_demo(runs_dir: Path, steps: int) -> list[str]:
    """Overrides of the experiment `demo`.

    Builds the runtimes, and makes the model and the rows, where they are not there yet: in the user's cache, which the
    nodes of a test cluster see.
    """
    build(default_names("cpu"))
    inputs = DemoInputs.of(1)
    making = ModelMaking(inputs, threads=os.cpu_count() or 1, progress=lambda said: None)
    making.start()
    making.wait()
    inputs.write_rows()
    without = ("evaluation.at_start=false", "evaluation.at_end=false")
    return [*inputs.overrides(eval_rows=8), f"cluster.runs_dir={runs_dir}", *without, f"grpo.max_steps={steps}"]
