"""The environment variables of a node's processes: as few as possible, and none of a login shell's secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from hpc_gym.plan.plan import Plan

# A local job inherits a login shell, of which only this is let through.
_LET_THROUGH = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|LC_\w+|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|XDG_\w+|SSL_CERT_\w+"
    r"|(?:CUDA|NVIDIA|NCCL|GLOO|UCX|ROCM|ROCR|HIP|HSA|OMP|MKL|KMP|OPENBLAS|TORCH|TORCHINDUCTOR|TRITON|VLLM|RAY|HF|TRANSFORMERS|UV)_\w+"
)
# A Slurm job starts from --export=NONE: what is there was set by the site or by the profile's setup lines. These
# still mislead.
_NEVER = re.compile(
    r"PYTHON(?!UNBUFFERED)\w*|VIRTUAL_ENV\w*|CONDA_\w+|SUBMITIT_\w+|HPC_GYM_\w+|NOTIFY_SOCKET|RANK|LOCAL_RANK|WORLD_SIZE"
    r"|MASTER_ADDR|MASTER_PORT|PM(?:I|IX)_\w+|SLURM_(?!JOB_|JOBID|CLUSTER_|NODEID|PROCID|LOCALID)\w+"
)
# Where a login shell keeps these, only the attempt's secrets file may bring them.
_SECRET = re.compile(r"\w*(?:TOKEN|API_KEY|SECRET|PASSWORD)\w*")


def process_environment(
    plan: Plan, inherited: Mapping[str, str], secrets: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    """What a process gets: of `inherited` what is allowed, then the plan's variables, then `own`, then `secrets`."""
    kept = {
        name: value
        for name, value in inherited.items()
        if not _NEVER.fullmatch(name)
        and not _SECRET.fullmatch(name)
        and name not in plan.secrets
        and (plan.launch.kind == "slurm" or _LET_THROUGH.fullmatch(name))
    }
    kept.setdefault("PATH", os.defpath)
    # Its default lies below TMPDIR, which goes with the attempt: vLLM would compile its first generation anew each
    # time.
    kept.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{_cache(inherited)}/torchinductor")
    return {**kept, "PYTHONUNBUFFERED": "1", **plan.env, **own, **secrets}


def secrets_of(plan: Plan, role: str, secrets: Mapping[str, str]) -> dict[str, str]:
    """Those of the attempt's secrets that a process of this role has any use for.

    Environments run what a model asks for: W&B's key is the trainers' alone, and the judge's that of the servers which
    read it from the secrets file.
    """
    judge = plan.rollout.judge
    kept_back = {judge.api_key_env} if judge is not None else set()
    if role != "train":
        kept_back.add("WANDB_API_KEY")
    return {name: value for name, value in secrets.items() if name not in kept_back}


def _cache(inherited: Mapping[str, str]) -> str:
    """The folder that hpc-gym keeps what can be made again in, runtimes among it."""
    home = inherited.get("XDG_CACHE_HOME") or str(Path(inherited.get("HOME") or Path.home()) / ".cache")
    return inherited.get("HPC_GYM_CACHE") or f"{home}/hpc-gym"
