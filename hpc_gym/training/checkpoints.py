"""Which checkpoints of a run are whole, and which are resumed from, kept and removed.

`RUN_DIR/checkpoints/checkpoint-STEP/` is written by all ranks, as transformers and DeepSpeed do; it counts once it
holds `complete.json`, which rank 0 writes after every rank has finished. A folder without it was torn by whatever ended
the attempt, and so was one whose files are shorter than it says: neither is resumed from, and both are removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

MARKER = "complete.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_OF_RANK = re.compile(r"(?:pp_rank|rng_state)_(\d+)")
"""In the name of a file that one rank writes: DeepSpeed's parts, and transformers' random state."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be resumed from; the text says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint after `step` steps, written by `world_size` ranks. `draws`: rows drawn until then."""

    path: Path
    step: int
    world_size: int
    draws: int


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path, kept: int) -> None:
        self.folder = folder
        self._kept = kept

    def path(self, step: int) -> Path:
        """Where the checkpoint of that step is, or belongs."""
        return self.folder / f"checkpoint-{step}"

    def complete(self) -> list[Checkpoint]:
        """All whole checkpoints, the newest last."""
        found = [checkpoint for path in self._folders() if (checkpoint := _read(path)) is not None]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def last(self, prompts_per_step: int) -> Checkpoint | None:
        """The newest whole checkpoint; None when the run starts from the beginning.

        Raises CheckpointError when it was trained with another number of prompts per step: the order of the data would
        not go on where it was.
        """
        found = self.complete()
        if not found:
            return None
        last = found[-1]
        if last.draws != last.step * prompts_per_step:
            raise CheckpointError(
                f"{last.path} was written after {last.draws} prompts in {last.step} steps, but this job trains on "
                f"{prompts_per_step} prompts per step: resume with the batch that it was trained with"
            )
        return last

    def is_complete(self, step: int) -> bool:
        return _read(self.path(step)) is not None

    def remove_torn(self) -> None:
        """Removes what an earlier attempt did not finish."""
        for path in self._folders():
            if _read(path) is None:
                shutil.rmtree(path)

    def make_durable(self, step: int, rank: int) -> None:
        """Returns when what this rank wrote of the checkpoint is on the storage: a node that crashes takes with it what
        its file system had only in memory. Rank 0 writes what carries no rank's number.
        """
        for path in _files(self.path(step)):
            if int(found[1] if (found := _OF_RANK.search(path.name)) else 0) == rank:
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def mark_complete(self, step: int, world_size: int, draws: int, seconds: float) -> None:
        """Says that all ranks have written the checkpoint of that step: durable, and in one step. `seconds`: what
        writing it took, for whoever must know how long the next one will.
        """
        path = self.path(step)
        checkpoint = Checkpoint(path, step, world_size, draws)
        facts = {name: value for name, value in asdict(checkpoint).items() if name != "path"}
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
        temporary = path / f".{MARKER}"
        with temporary.open("w") as file:
            json.dump({**facts, "seconds": round(seconds, 3), "bytes": sizes}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / MARKER)

    def prune(self) -> None:
        """Removes all but the newest whole checkpoints. The marker goes first, so that no half-removed folder
        counts.
        """
        for checkpoint in self.complete()[: -self._kept]:
            (checkpoint.path / MARKER).unlink()
            shutil.rmtree(checkpoint.path)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _FOLDER.fullmatch(path.name)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, f".{MARKER}")]


def _read(path: Path) -> Checkpoint | None:
    try:
        facts = json.loads((path / MARKER).read_text())
        # Not exactly: to the node that wrote them down, files of the others may have looked shorter (NFS).
        if any((path / name).stat().st_size < size for name, size in facts.get("bytes", {}).items()):
            return None
        return Checkpoint(path, int(facts["step"]), int(facts["world_size"]), int(facts["draws"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
