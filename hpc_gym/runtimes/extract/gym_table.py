"""What the configurations that ship in the nemo-gym wheel define."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("resources_servers", "responses_api_agents", "responses_api_models")
_PATTERNS = (
    "environments/*/config.yaml",
    "resources_servers/*/configs/*.yaml",
    "responses_api_models/*/configs/*.yaml",
)


def table() -> dict[str, Any]:
    """`configs` by path, as `config_paths` names them; `servers`: what each server's code needs beside nemo-gym."""
    packages = _packages()
    files = sorted(file for pattern in _PATTERNS for file in packages.glob(pattern))
    servers = sorted(app.parent for kind in KINDS for app in packages.glob(f"{kind}/*/app.py"))
    return {
        "source": {"nemo-gym": importlib.metadata.version("nemo-gym")},
        "configs": {str(file.relative_to(packages)): _config(file, packages) for file in files},
        "servers": {str(folder.relative_to(packages)): _requirements(folder) for folder in servers},
    }


def _packages() -> Path:
    spec = importlib.util.find_spec("nemo_gym")
    if spec is None or spec.origin is None:
        raise RuntimeError("nemo_gym is not installed here")
    return Path(spec.origin).parents[1]


def _config(file: Path, packages: Path) -> dict[str, Any]:
    """The server instances that a configuration defines, the ones it refers to, and its dataset files."""
    import yaml

    tree = yaml.safe_load(file.read_text()) or {}
    instances: dict[str, Any] = {}
    references: set[tuple[str, str]] = set()
    datasets: list[dict[str, Any]] = []
    for name, value in tree.items():
        kind = next((kind for kind in KINDS if isinstance(value, dict) and kind in value), None)
        if kind is None or not isinstance(value[kind], dict):
            continue
        instances[name] = {"type": kind, "servers": sorted(value[kind])}
        references |= set(_references(value))
        for settings in value[kind].values():
            datasets += settings.get("datasets") or [] if isinstance(settings, dict) else []
    paths = sorted({str(entry["jsonl_fpath"]) for entry in datasets if "jsonl_fpath" in entry})
    return {
        "instances": instances,
        "parents": [str(path) for path in tree.get("config_paths") or []],
        "models": sorted(name for kind, name in references if kind == "responses_api_models"),
        "servers": sorted(f"{kind}/{name}" for kind, name in references if kind != "responses_api_models"),
        "data": [path for path in paths if (packages / path).is_file()],
        "data_missing": [path for path in paths if not (packages / path).is_file()],
    }


def _references(value: Any) -> Iterator[tuple[str, str]]:
    """All `{type: KIND, name: INSTANCE}` in a configuration."""
    if isinstance(value, dict):
        if value.get("type") in KINDS and isinstance(value.get("name"), str):
            yield value["type"], value["name"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _requirements(folder: Path) -> dict[str, Any]:
    """`needs`: the lines of its requirements other than nemo-gym itself; `missing`: those that this runtime lacks."""
    file = folder / "requirements.txt"
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()] if file.exists() else []
    needs = [line for line in lines if line and not line.startswith(("-e nemo-gym", "--"))]
    return {"needs": needs, "missing": [line for line in needs if not _is_met(line)]}


def _is_met(requirement: str) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = Requirement(requirement)
        installed = importlib.metadata.version(wanted.name)
    except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
        return False
    return re.match(r".*@", requirement) is None and wanted.specifier.contains(installed, prereleases=True)
