"""What the shell offers when a name is completed."""

from __future__ import annotations

from hpc_gym.shipped import shipped


def experiments(incomplete: str) -> list[str]:
    """Names of the experiments under `configs/experiments`, here and shipped, and YAML files."""
    from pathlib import Path

    folders = (Path("configs/experiments"), shipped("configs") / "experiments")
    names = {file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")}
    names |= {str(file) for file in Path().glob(f"{incomplete}*.yaml")}
    return sorted(name for name in names if name.startswith(incomplete))


def clusters(incomplete: str) -> list[str]:
    """Names of the cluster profiles under `configs/clusters`, here and shipped."""
    from pathlib import Path

    folders = (Path("configs/clusters"), shipped("configs") / "clusters")
    names = {file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")}
    return sorted(name for name in names if name.startswith(incomplete))


def jobs(incomplete: str) -> list[str]:
    """`latest` and the names of all runs, newest first; job ids once something has been typed."""
    from hpc_gym.jobs.records import all_records

    records = all_records()
    names = ["latest", *(record.name for record in records)]
    if incomplete:
        names += [record.job_id for record in records]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
