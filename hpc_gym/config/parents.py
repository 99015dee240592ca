"""Finds the files that an experiment's name and its `extends` mean.

A name that starts with `./`, `../`, `/` or `~`, or ends in `.yaml`, is a file (relative to the one that names it).
Any other name, such as `clusters/local`, is looked for in the folder of the file that names it, then in the
`configs` folder which that file lies in, in `./configs`, and in the configs that come with hpc-gym.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from hpc_gym.config.provenance import display
from hpc_gym.errors import UserError
from hpc_gym.shipped import shipped

_SUFFIXES = (".yaml", ".yml")


def find_experiment(experiment: str | Path) -> Path:
    """The file of an experiment: a file, or a name under `configs/experiments/`.

    Raises UserError naming where it was looked for and the nearest names.
    """
    text = str(experiment)
    path = Path(text).expanduser()
    if path.is_file():
        return path.resolve()
    if path.suffix in _SUFFIXES or path.is_absolute() or text.startswith("."):
        what = "that is a folder, and an experiment is a YAML file" if path.is_dir() else "there is no such file"
        raise UserError(f"experiment '{text}': {what}.")
    folders = [root / "experiments" for root in (Path.cwd() / "configs", shipped("configs").resolve())]
    found = _first(text, folders)
    if found is None:
        raise UserError(f"experiment '{text}': no file of that name, and {_not_found(text, folders)}")
    return found


def find_cluster(name: str, experiment: Path) -> Path:
    """The profile that `--cluster NAME` means: a file (relative to the working directory) or a name under
    `clusters/`.
    """
    told = f"--cluster {name}"
    if "/" in name or name.endswith(_SUFFIXES):
        return find_parent(name, Path.cwd() / "experiment", told)
    return find_parent(f"clusters/{name}", experiment, told)


def find_parent(name: str, file: Path, told: str) -> Path:
    """The file that `name` means where `file` extends it; `told` is how an error says who asked for it."""
    path = Path(name).expanduser()
    if path.suffix in _SUFFIXES or path.is_absolute() or name.startswith(("./", "../")):
        target = (file.parent / path).resolve()
        if target.is_file():
            return target
        folder = f" {display(target)} is a folder: name a file in it." if target.is_dir() else ""
        raise UserError(f"{told}: '{name}': there is no file {display(target)}.{folder}")
    folders = _roots(file)
    found = _first(name, folders)
    if found is None:
        raise UserError(f"{told}: '{name}': {_not_found(name, folders, file)}")
    return found


def _roots(file: Path) -> list[Path]:
    own = next((folder for folder in file.parents if folder.name == "configs"), None)
    roots = [file.parent, *([own] if own else []), Path.cwd() / "configs", shipped("configs").resolve()]
    return list(dict.fromkeys(roots))


def _first(name: str, folders: list[Path]) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for folder in folders for suffix in _SUFFIXES)
    return next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)


def _not_found(name: str, folders: list[Path], file: Path | None = None) -> str:
    """Where `name` was looked for, and the nearest names; `file`, which asks for it, is none of them."""
    looked = ", ".join(display(root).removesuffix("/.") for root in folders)
    folder, _, last = name.rpartition("/")
    known = _names(folders, f"{folder}/*" if folder else "*", file)
    elsewhere = [] if folder and known else _names(folders, "*/*", file)
    close = [each for each in elsewhere if each.rpartition("/")[2] == last] if not folder else []
    close = close or difflib.get_close_matches(name, [*known, *elsewhere], n=3, cutoff=0.5)
    if close:
        return f"not found in {looked}; did you mean {' or '.join(repr(match) for match in close)}?"
    if known or elsewhere:
        return f"not found in {looked}; there are: {', '.join(elsewhere or known)}."
    return f"not found in {looked}; nothing of that kind is there."


def _names(folders: list[Path], pattern: str, file: Path | None) -> list[str]:
    """The names under which the YAML files that match can be extended; `base`, which all inherit, is none."""
    return sorted(
        {
            str(found.relative_to(root).with_suffix(""))
            for root in folders
            for found in root.glob(f"{pattern}.y*ml")
            if found.suffix in _SUFFIXES and found != file and found != shipped("configs").resolve() / "base.yaml"
        }
    )
