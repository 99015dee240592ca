"""The commands `up` and `down`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import cluster as slurm
from cluster_life import Settings
from machine import ClusterError


def main(command: str) -> None:
    """The commands `up` and `down`."""
    parser = argparse.ArgumentParser(
        prog=command, description=slurm.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("/tmp/hpc-gym-slurm"), help="state, logs and configuration")
    if command == "up":
        defaults = Settings()
        for field in dataclasses.fields(Settings):
            kind = {"int": int, "str": str}[str(field.type)]
            default = getattr(defaults, field.name)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"default {default!r}")
    else:
        parser.add_argument("--purge", action="store_true", help="remove the folder with its logs too")
    options = vars(parser.parse_args())
    if os.geteuid() != 0:
        os.execvp("sudo", ["sudo", sys.executable, *sys.argv])
    cluster = slurm.Cluster(options.pop("dir"))
    try:
        if command == "up":
            cluster.up(**{name: value for name, value in options.items() if value is not None})
            print(cluster.slurm("sinfo"), end="")
            print(f". {cluster.directory}/env    and this shell talks to the cluster; logs: {cluster.directory}/log")
        else:
            cluster.down(**options)
    except ClusterError as error:
        sys.exit(f"slurm: {error}")
