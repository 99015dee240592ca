from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.node.causes import cause_from_log, is_collateral

STAMP = "2026-11-20T13:14:05.534817Z "


def log(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.log"
    path.write_text("".join(f"{STAMP}{line}\n" for line in text.splitlines()))
    return path


def test_the_exception_of_the_last_traceback_is_the_cause(tmp_path: Path) -> None:
    text = """
Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
    raise RuntimeError(
torch.OutOfMemoryError: CUDA out of memory
some later line"""
    assert cause_from_log(log(tmp_path, text)) == "torch.OutOfMemoryError: CUDA out of memory"


def test_a_prefix_before_every_line_of_the_traceback_is_no_obstacle(tmp_path: Path) -> None:
    text = """(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7)   File "core.py", line 9, in run
(EngineCore pid=7) ValueError: No available memory for the cache blocks"""
    assert cause_from_log(log(tmp_path, text)) == "ValueError: No available memory for the cache blocks"


def test_an_exception_that_points_to_the_one_before_it_is_passed_over(tmp_path: Path) -> None:
    dead = """(APIServer pid=6) ERROR Traceback (most recent call last):
(APIServer pid=6) ERROR   File "async_llm.py", line 1, in output_handler
(APIServer pid=6) ERROR vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."""  # noqa: E501
    engine = """(EngineCore pid=7) ERROR Traceback (most recent call last):
(EngineCore pid=7) ERROR   File "core.py", line 9, in run
(EngineCore pid=7) ERROR torch.OutOfMemoryError: CUDA out of memory
"""
    assert cause_from_log(log(tmp_path, engine + dead)) == "torch.OutOfMemoryError: CUDA out of memory"
    assert cause_from_log(log(tmp_path, dead)).startswith("vllm.v1.engine.exceptions.EngineDeadError")


def test_what_srun_says_counts_only_where_the_program_said_nothing(tmp_path: Path) -> None:
    srun = "srun: error: node2: task 0: Exited with exit code 1"
    text = f"""Traceback (most recent call last):
  File "a.py", line 1, in <module>
{srun}
ValueError: in the container"""
    assert cause_from_log(log(tmp_path, text)) == "ValueError: in the container"
    assert cause_from_log(log(tmp_path, srun)) == srun


def test_without_a_traceback_the_last_words_count(tmp_path: Path) -> None:
    assert cause_from_log(log(tmp_path, "starting\nerror: no such file: model\n\n")) == "error: no such file: model"
    assert cause_from_log(tmp_path / "missing.log") == ""


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.log"
    path.write_bytes((STAMP.encode() + b"x" * 90 + b"\n") * 200_000 + STAMP.encode() + b"OSError: disk full\n")
    assert cause_from_log(path) == "OSError: disk full"


@pytest.mark.parametrize(
    "cause",
    [
        "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:38417",
        "torch.distributed.DistBackendError: NCCL error in: ..., remote process exited or there was a network error",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for"
        " recv operation to complete",
        "RuntimeError: Application timeout caused pair closure",
        "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cuda//timeout_dump",
        "RuntimeError: The client socket has timed out after 600000ms while trying to connect to (node3, 4711).",
        "RuntimeError: [1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value"
        " store by key '0', but store->get('0') got error: Connection was likely closed.",
        "RuntimeError: Rank 0 successfully reached monitoredBarrier, but received errors while waiting for send/recv"
        " from rank 1",
        "hpc_gym.protocol.client.RolloutServerError: rollout server 10.77.0.11:40213 is gone: not reached for 121 s"
        " (ClientConnectorError()); 3 of 8 rollouts are missing",
        "hpc_gym.weights.sender.WeightTransferError: weights 3 did not reach every vLLM replica: rollout server"
        " 10.77.0.11:40213: /weights/update failed: Cannot connect to host 10.77.0.11:40213 (tried 3 times)",
    ],
)
def test_the_loss_of_a_peer_is_known_as_such(cause: str) -> None:
    assert is_collateral(cause)


@pytest.mark.parametrize(
    "cause",
    [
        "",
        "KeyError: 'reward'",
        "torch.OutOfMemoryError: CUDA out of memory",
        "OSError: [Errno 28] No space left on device",
        "hpc_gym.weights.sender.WeightTransferError: weights 3 did not reach every vLLM replica: weight 'a' comes where"
        " 'b' was announced",
    ],
)
def test_a_cause_of_its_own_is_none(cause: str) -> None:
    assert not is_collateral(cause)
