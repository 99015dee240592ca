"""What a job keeps to itself, as promises about a running one: its secrets, from all; its ports, sockets and files,
from other nodes and other users.
"""

from __future__ import annotations

import re
import secrets as random
from collections.abc import Mapping
from pathlib import Path

import pytest
import scans
from slurm_jobs import SlurmJob

from hpc_gym.protocol.secrets import read_secrets

_SLURMS = ("slurmd", "srun", "slurmstepd")
_SERVERS = {"rollout": "rollout-server", "judge": "judge-server", "environment": "environment-server"}
"""The process that answers other nodes, by role."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Secrets in the environment that a job is submitted from; `OF_THE_SHELL` is named by no experiment."""
    words = {name: random.token_hex(20) for name in ("WANDB_API_KEY", "HF_TOKEN", "JUDGE_KEY", "OF_THE_SHELL")}
    for name, word in words.items():
        monkeypatch.setenv(name, word)
    return words


def with_the_attempts(run: SlurmJob, planted: Mapping[str, str]) -> dict[str, str]:
    """The planted secrets and those that the attempt made itself."""
    attempt = read_secrets(run.run_dir / "secrets" / "attempt-1.json").token
    nodes = {f"token of {node}": (folder / "token").read_text() for node, folder in run.private_dirs().items()}
    words = {**planted, "token of the attempt": attempt, **nodes}
    assert all(words.values())
    assert len(set(words.values())) == len(planted) + 1 + len(run.plan.nodes)
    return words


def nothing_was_said(run: SlurmJob, words: Mapping[str, str]) -> None:
    """While a job runs: no secret stands anywhere but in 0600 files, in folders that nobody else enters."""
    assert scans.on_command_lines(words) == []
    assert scans.in_slurms_records(words, run) == []
    private = [run.run_dir / "secrets", *run.private_dirs().values()]
    assert scans.in_files(words, run.cluster.directory, Path.home() / ".config", but=private) == []
    for folder in private:
        assert folder.stat().st_mode & 0o777 == 0o700
    for file in (*private[0].iterdir(), *(folder / "token" for folder in private[1:])):
        assert file.stat().st_mode & 0o777 == 0o600


def nothing_is_left(run: SlurmJob, words: Mapping[str, str]) -> None:
    """The same after its end."""
    assert not (run.run_dir / "secrets").exists()
    assert scans.in_files(words, run.cluster.directory, Path.home() / ".config") == []


def another_user_finds_nothing(run: SlurmJob, words: Mapping[str, str], host: str) -> None:
    """On a node of the job: no process, folder, socket or shared memory of the job is open to another user; of the run
    directory he reads what the umask lets him, which holds no secret.
    """
    kept = str(run.run_dir / "secrets")
    reach = scans.reach_of_another_user(run.cluster, host, "/tmp", "/dev/shm", str(run.run_dir))
    assert reach.environments == []
    # Slurm's own steps listen there.
    assert [path for path in reach.sockets if not path.startswith(str(run.cluster.directory / "spool"))] == []
    assert [path for path in (*reach.files, *reach.listed) if "/hg-" in path or path.startswith(kept)] == []
    assert [path for path in reach.files if path.startswith("/dev/shm")] == []
    assert str(run.run_dir / "plan.json") in reach.files
    assert scans.in_files(words, *map(Path, reach.files)) == []


def only_documented_ports_answer(run: SlurmJob) -> None:
    """Seen from another node: the ports in the table of docs/slurm.md, and Slurm's own."""
    hosts = {node.name: run.host(node.name) for node in run.plan.nodes}
    for node in run.plan.nodes:
        held_by = scans.programs(run.cluster, hosts[node.name])
        source = next(host for host in run.cluster.node_names if host != hosts[node.name])
        (found,) = scans.scan(run.cluster, source, [run.address(node.name)]).values()
        # A port that was open for a moment, of an outgoing connection, has no listener.
        answers = {port: said for port, said in found.items() if held_by.get(port, "slurmd") not in _SLURMS}
        print(node.name, {port: (held_by[port], said) for port, said in answers.items()})
        if server := _SERVERS.get(node.role):
            log = (run.attempt() / "logs" / f"{node.name}-{server}.log").read_text()
            port = re.search(r" server of .* on [\d.]+:(\d+)", log)
            assert port
            assert answers.pop(int(port[1])) == "HTTP/1.1 401 Unauthorized"
        if node.rank == 0:
            assert answers.pop(scans.coordinator_of(run)) == ""
        # gloo and the ranks' store: silent, or closed at once. Nobody sends weights to the others.
        expected = {"train": {"python"}, "rollout": {"python", "VLLM::EngineCor"}}.get(node.role, set())
        assert {held_by[port] for port in answers} <= expected
        assert set(answers.values()) <= {"", "(silence)"}
        # vLLM takes part in the transfers of weights, and in nothing else that crosses the network.
        assert [held_by[port] for port in answers].count("VLLM::EngineCor") <= 1


def what_is_on_loopback_wants_a_token_or_is_nemo_gym(run: SlurmJob, node: str) -> None:
    """Seen by another user of the node that NeMo Gym is on."""
    host = run.host(node)
    (found,) = scans.scan(run.cluster, host, ["127.0.0.1"], user=scans.ANOTHER_USER).values()
    (policy,) = [port for port in found if _is_policy_endpoint(run, host, port, found[port])]
    chat = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
    assert scans.request(run.cluster, host, policy, "/v1/chat/completions", chat) == 403
    assert scans.request(run.cluster, host, policy, "/v1/chat/completions", {**chat, "hpc_gym_rollout": "x"}) == 403
    judged = run.plan.rollout.judge is not None
    assert scans.request(run.cluster, host, policy, "/judge/v1/chat/completions", chat) == (403 if judged else 404)
    # Ray's dashboard starts jobs, for whoever may.
    assert 8265 in found
    for path, body in (("/api/jobs/", {"entrypoint": "id"}), ("/api/jobs/", None), ("/nodes?view=summary", None)):
        assert scans.request(run.cluster, host, 8265, path, body) == 401


def _is_policy_endpoint(run: SlurmJob, host: str, port: int, said: str) -> bool:
    """Whether a port is the one on loopback that NeMo Gym asks, which serves nothing at /."""
    return said == "HTTP/1.1 404 Not Found" and scans.request(run.cluster, host, port, "/v1/models") == 200
