"""Starts what the training tests need in the runtimes: programs of `training_programs/`, and a `vllm serve`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_gym.runtimes.build import build
from hpc_gym.runtimes.spec import spec_of

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "training_programs"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_SERVER_DEV_MODE": "1",
}


def environment(**more: str) -> dict[str, str]:
    """A small environment with hpc_gym and the test programs importable; .pyc files are written, imports are slow
    without.
    """
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | _ENVIRONMENT | {"PYTHONPATH": f"{REPOSITORY}:{PROGRAMS}"} | more


def runtime_python(name: str) -> Path:
    """The interpreter of a runtime, which is built where it is missing."""
    build([name])
    return spec_of(name).python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_program(program: str, *arguments: object, timeout_s: float = 240.0) -> str:
    """The standard output of a program in the train runtime; fails with its last lines when it does."""
    command = [str(runtime_python("train-cpu")), str(PROGRAMS / program), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, (
        f"{program} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class RankFailed(AssertionError):
    """A rank exited with another code than was expected."""


def start_ranks(program: str, arguments: Sequence[object], logs: Path, world_size: int = 2, **env: str) -> list[Any]:
    """Starts a program once per rank, as the supervisor does, each with its own log."""
    port = str(free_port())
    python = str(runtime_python("train-cpu"))
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(world_size):
        variables = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **env,
        )
        with (logs / f"rank-{rank}.log").open("ab") as log:
            command = [python, str(PROGRAMS / program), *map(str, arguments)]
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True))
    return started


def wait_ranks(ranks: Sequence[Any], logs: Path, expected: int = 0, timeout_s: float = 200.0) -> None:
    """Waits for all ranks, which must exit with that code; none is left running."""
    end = time.monotonic() + timeout_s
    try:
        for number, rank in enumerate(ranks):
            code = rank.wait(max(1.0, end - time.monotonic()))
            if code != expected:
                log = (logs / f"rank-{number}.log").read_text()[-4000:]
                raise RankFailed(f"rank {number} exited with {code}, not {expected}:\n{log}")
    finally:
        for rank in ranks:
            _end(rank)


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """A running `vllm serve` of a model on the CPU, as `policy`; yields its address."""
    port = free_port()
    vllm = runtime_python("inference-cpu").with_name("vllm")
    command = [str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "policy", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", "134217728", "--generation-config", "vllm"]
    command += ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "hpc_gym"}', *options]
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while not _serves(url, model):
            assert server.poll() is None, f"vllm serve died:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"vllm serve is not ready:\n{log.read_text()[-3000:]}"
            time.sleep(0.5)
        yield url
    finally:
        _end(server)


def _serves(url: str, model: Path) -> bool:
    """Whether the right server answers: anybody may have got the port meanwhile."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=2) as answer:
            return bool(json.load(answer)["data"][0]["root"] == str(model))
    except OSError:
        return False


def _end(process: Any) -> None:
    """Ends a process and its group."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
