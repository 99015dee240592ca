"""What the demo needs before it can be submitted: its model and rows, made on the spot, once per seed and recipe."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpc_gym
from hpc_gym.data import demo_rows
from hpc_gym.errors import UserError
from hpc_gym.runtimes.spec import cache_folder, spec_of

TRAIN_RUNTIME = "train-cpu"

_PACKAGE = Path(hpc_gym.__file__).resolve().parent
_RECIPE = ("data/demo_rows.py", "training/demo_model.py", "training/demo_chat_template.jinja")
"""Files of the package that the model and the rows follow from."""
_STOP_WITHIN_S = 5.0


@dataclass(frozen=True)
class DemoInputs:
    """The folder of one seed's model and rows."""

    folder: Path
    seed: int

    @classmethod
    def of(cls, seed: int) -> DemoInputs:
        """Where they are, or will be: another recipe, runtime or seed has another folder."""
        digest = hashlib.sha256(f"{spec_of(TRAIN_RUNTIME).digest} {seed}".encode())
        for name in _RECIPE:
            digest.update((_PACKAGE / name).read_bytes())
        return cls(cache_folder() / "demo" / digest.hexdigest()[:12], seed)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def has_model(self) -> bool:
        """Whether the model is there; it appears whole or not at all."""
        return (self.model / "config.json").is_file()

    def write_rows(self) -> None:
        """Writes the rows, and makes this folder the one that the experiment `demo` takes by itself."""
        demo_rows.write(self.folder / "data", self.seed)
        latest = self.folder.parent / "latest"
        partial = latest.with_name(f".latest.{os.getpid()}")
        partial.symlink_to(self.folder.name)
        partial.replace(latest)

    def overrides(self, eval_rows: int) -> list[str]:
        """What the experiment `demo` is told: this folder, this seed, and how many held-out rows it evaluates."""
        told = [f"vars.demo_dir={json.dumps(str(self.folder))}", f"seed={self.seed}"]
        if eval_rows < demo_rows.HELD_OUT:
            sources = []
            for environment in demo_rows.ENVIRONMENTS:
                path = self.folder / "data" / f"{environment}-held-out-{eval_rows}.jsonl"
                demo_rows.write_rows(path, demo_rows.split(environment, self.seed).held_out[:eval_rows])
                sources.append({"environment": environment, "path": str(path)})
            told.append(f"data.eval={json.dumps(sources)}")
        return told


Progress = Callable[[dict[str, Any]], None]
"""Takes what `hpc_gym.training.demo_model` says: `stage`, `step`, `steps`, `seconds`. Called from a thread."""


class ModelMaking:
    """The making of the demo's model: a program in the train runtime. Nothing happens when the model is there."""

    def __init__(self, inputs: DemoInputs, threads: int, progress: Progress) -> None:
        self._inputs = inputs
        self._threads = threads
        self._progress = progress
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._cancelled = False
        self._lock = threading.Lock()

    @property
    def log(self) -> Path:
        """What the program says besides its progress."""
        return self._inputs.folder / "model.log"

    def start(self) -> None:
        """Starts the program; the train runtime must be there."""
        if self._inputs.has_model:
            self._progress({"stage": "saved", "step": 1, "steps": 1, "seconds": 0.0})
            return
        self._inputs.folder.mkdir(parents=True, exist_ok=True)
        command = [str(spec_of(TRAIN_RUNTIME).python), "-m", "hpc_gym.training.demo_model"]
        command += ["--out", str(self._inputs.model), "--seed", str(self._inputs.seed), "--threads", str(self._threads)]
        with self._lock:
            if self._cancelled:
                return
            with self.log.open("w") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self._environment(),
                    start_new_session=True,
                )
        self._reader.start()

    def wait(self) -> None:
        """Waits for the end. Raises UserError when the program failed."""
        if self._process is None:
            return
        status = self._process.wait()
        self._reader.join()
        if status != 0:
            tail = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-8:])
            raise UserError(f"the demo's model could not be made (exit code {status}):\n{tail}\nWhole log: {self.log}")

    def cancel(self) -> None:
        """Ends the program, also one that would only be started now."""
        with self._lock:
            self._cancelled = True
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._progress(json.loads(line))
            except ValueError:
                continue

    def _environment(self) -> dict[str, str]:
        # A folder with nothing but the package: beside an installed one lie packages of another Python.
        code = self._inputs.folder / "code"
        code.mkdir(exist_ok=True)
        link = code / f".{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(_PACKAGE)
        link.replace(code / "hpc_gym")
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return inherited | {"PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
