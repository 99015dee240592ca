"""How many GPUs of a node the options of sbatch ask for."""

from __future__ import annotations

import pytest

from hpc_gym.config.slurm_gpus import gpu_option, gpus_per_node


@pytest.mark.parametrize(
    ("options", "option", "gpus"),
    [
        ({"gpus_per_node": 8}, "gpus_per_node", 8),
        ({"gpus-per-node": "h100:8"}, "gpus-per-node", 8),
        ({"gpus-per-node": "a100:2,v100:1"}, "gpus-per-node", 3),
        ({"gpus-per-task": "4"}, "gpus-per-task", 4),
        ({"gres": "gpu:4"}, "gres", 4),
        ({"gres": "gpu:h100:8,lustre:1"}, "gres", 8),
        ({"gres": "lustre:1,gpu:h100:8"}, "gres", 8),
        ({"gres": "gpu"}, "gres", 1),
        ({"gres": "gpu:h100"}, "gres", 1),
        ({"gres": "gpu:0"}, "gres", 0),
        ({"tres-per-task": "cpu:4,gres/gpu:8"}, "tres-per-task", 8),
        ({"tres_per_task": "gres/gpu:h100=8"}, "tres_per_task", 8),
        ({"gres": "lscratch:200", "gpus-per-node": "8"}, "gpus-per-node", 8),
        # Only Slurm knows the sockets of a node.
        ({"gpus-per-socket": 2}, "gpus-per-socket", None),
        ({"gres": "lscratch:200"}, None, None),
        ({"tres-per-task": "cpu:4"}, None, None),
        ({"gpu-bind": "closest", "gres": None, "gpus-per-node": None}, None, None),
    ],
)
def test_they_are_read_as_slurm_reads_them(options: dict[str, object], option: str | None, gpus: int | None) -> None:
    assert (gpu_option(options), gpus_per_node(options)) == (option, gpus)
