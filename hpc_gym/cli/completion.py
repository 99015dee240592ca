"""What the shell offers when a name is completed."""

from __future__ import annotations

from hpc_gym.shipped import shipped

_SUFFIXES = (".yaml", ".yml")


def experiments(incomplete: str) -> list[str]:
    """Names of the experiments under `configs/experiments`, here and shipped, YAML files, and folders on the way."""
    return _offered("experiments", incomplete)


def clusters(incomplete: str) -> list[str]:
    """Names of the cluster profiles under `configs/clusters`, here and shipped, YAML files, and folders on the way."""
    return _offered("clusters", incomplete)


def _offered(kind: str, incomplete: str) -> list[str]:
    import glob
    from pathlib import Path

    folders = (Path("configs") / kind, shipped("configs") / kind)
    names = {file.stem for folder in folders for suffix in _SUFFIXES for file in folder.glob(f"*{suffix}")}
    # What has been typed is text, also where a pattern would mean something else or is none.
    for found in glob.glob(glob.escape(incomplete) + "*"):  # noqa: PTH207 (a Path takes no absolute pattern)
        if Path(found).is_dir():
            names.add(f"{found}/")
        elif found.endswith(_SUFFIXES):
            names.add(found)
    return sorted(name for name in names if name.startswith(incomplete))


def jobs(incomplete: str) -> list[str]:
    """`latest` and the names of all runs, newest first; job ids once something has been typed."""
    from hpc_gym.jobs.records import all_records

    records = all_records()
    names = ["latest", *(record.name for record in records)]
    if incomplete:
        names += [record.job_id for record in records]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
