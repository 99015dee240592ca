"""What a job keeps to itself: its secrets, and its ports, sockets and files, from other nodes and from other users."""

from __future__ import annotations

import re
import secrets as random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import scans
from cluster import Cluster
from demo_job import small_demo
from slurm_jobs import FOREVER, SlurmJob, service, task

from hpc_gym import submit as submit_experiment
from hpc_gym.protocol.secrets import read_secrets

Submit = Callable[..., SlurmJob]


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


def test_secrets_of_a_job_stand_in_its_files_and_environments_alone(
    submit: Submit, planted: dict[str, str], shared: Path
) -> None:
    shared.chmod(0o755)
    code = "import os; print('planted' if os.environ['JUDGE_KEY'] else '', 'OF_THE_SHELL' in os.environ, flush=True)"
    named = ("WANDB_API_KEY", "HF_TOKEN", "JUDGE_KEY")
    run = submit([service("server", FOREVER)], [task("rank-0", f"{code}\n{FOREVER}")], secrets=named)
    run.all_started()
    log = run.attempt() / "logs" / "train-0-rank-0.log"
    run.until(lambda: log.exists() and "planted False" in log.read_text())
    words = with_the_attempts(run, planted)
    nothing_was_said(run, words)
    another_user_finds_nothing(run, words, run.host("rollout-0"))
    seen = {name: processes for name, processes in scans.in_environments(words, run).items() if processes}
    both = {"server", "rank-0"}
    assert seen == {"WANDB_API_KEY": {"rank-0"}, "HF_TOKEN": both, "JUDGE_KEY": both}
    run.job.cancel()
    assert not (run.run_dir / "secrets").exists()
    assert scans.in_files(words, run.cluster.directory) == []


def test_setup_lines_and_variables_of_the_profile_reach_all_nodes_of_all_components(
    submit: Submit, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    monkeypatch.setenv("OF_THE_SHELL", "1")
    (shared / "modules.sh").write_text('module() { export LOADED="$*"; }\n')
    setup = (
        f"source {shared}/modules.sh",
        "module load cuda/12.8",
        "export SET_UP='on all nodes' PATH=/opt/site:$PATH",
    )
    names = ("LOADED", "SET_UP", "OF_THE_PROFILE", "HF_HUB_OFFLINE", "OF_THE_SHELL")
    code = f"import os; print([os.environ.get(name) for name in {names}], os.environ['PATH'].count('/opt/site'))"
    run = submit(
        [service("server", f"{code}\n{FOREVER}")],
        [task("rank-0", f"{code}\nimport time; time.sleep(2)")],
        [task("rank-1", f"{code}\nimport time; time.sleep(2)")],
        components=({"nodes": 1, "partition": "cpu"}, {"nodes": 2, "partition": "gpu"}),
        setup=setup,
        env={"OF_THE_PROFILE": "it's", "HF_HUB_OFFLINE": "1"},
    )
    run.freed(60)
    assert run.job.state == "COMPLETED", run.story()
    said = {log.name: log.read_text() for log in (run.attempt() / "logs").iterdir() if "supervisor" not in log.name}
    assert len(said) == 3
    wanted = "['load cuda/12.8', 'on all nodes', \"it's\", '1', None] 1"
    assert all(wanted in text for text in said.values()), said


@pytest.fixture
def demo(slurm_cluster: Cluster, shared: Path, planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> SlurmJob:
    """The demo's job with vLLM, NeMo Gym, the trainers and W&B, which goes on until it is cancelled."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    shared.chmod(0o755)
    wanted = [
        *small_demo(shared, 500),
        "cluster.slurm.rollout.partition=cpu",
        "checkpoints.every=2",
        "secrets=[WANDB_API_KEY, HF_TOKEN, JUDGE_KEY]",
    ]
    return SlurmJob(submit_experiment("demo", wanted, cluster="slurm-test"), slurm_cluster)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_demos_job_keeps_its_secrets_and_answers_nobody_who_has_no_token(
    demo: SlurmJob, planted: dict[str, str]
) -> None:
    run = demo
    run.all_started(within_s=90)
    metrics = run.run_dir / "metrics.jsonl"
    run.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, within_s=300)
    words = with_the_attempts(run, planted)
    nothing_was_said(run, words)
    seen = {name: processes for name, processes in scans.in_environments(words, run).items() if processes}
    assert set(seen) == {"WANDB_API_KEY", "HF_TOKEN", "JUDGE_KEY"}
    assert seen["WANDB_API_KEY"] == {"rank-0", "rank-1"}
    environments = scans.variables_of(run)
    assert set(environments) >= {"vllm-0", "gym", "rollout-server", "rank-0", "rank-1"}
    assert all(any(b"HF_HUB_OFFLINE=1" in data for data in each) for each in environments.values())
    only_documented_ports_answer(run)
    what_is_on_loopback_wants_a_token_or_is_nemo_gym(run)
    for node in ("rollout-0", "train-0"):
        another_user_finds_nothing(run, words, run.host(node))

    steps = metrics.read_text().count("\n")
    run.until(lambda: metrics.read_text().count("\n") > steps, within_s=60)
    assert not [event for event in run.events() if event["event"] in ("exited", "restarting", "failed")]
    run.job.cancel()
    assert run.job.state == "CANCELLED"
    assert run.left() == {}
    assert not (run.run_dir / "secrets").exists()
    assert list(run.run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert scans.in_files(words, run.cluster.directory, Path.home() / ".config") == []


def only_documented_ports_answer(run: SlurmJob) -> None:
    """Seen from another node: the ports in the table of docs/slurm.md, and Slurm's own."""
    slurms = ("slurmd", "srun", "slurmstepd")
    for node in run.plan.nodes:
        held_by = scans.programs(run.cluster, run.host(node.name))
        (found,) = scans.scan(run.cluster, "node5", [run.address(node.name)]).values()
        # A port that was open for a moment, of an outgoing connection, has no listener.
        answers = {port: said for port, said in found.items() if held_by.get(port, "slurmd") not in slurms}
        print(node.name, {port: (held_by[port], said) for port, said in answers.items()})
        if node.role == "rollout":
            log = (run.attempt() / "logs" / f"{node.name}-rollout-server.log").read_text()
            said_port = re.search(r"rollout server of .* on [\d.]+:(\d+)", log)
            assert said_port
            assert answers.pop(int(said_port[1])) == "HTTP/1.1 401 Unauthorized"
        if node.rank == 0:
            assert answers.pop(scans.coordinator_of(run)) == ""
        # gloo and the ranks' store: silent, or closed at once.
        assert {held_by[port] for port in answers} <= {"python", "VLLM::EngineCor"}
        assert set(answers.values()) <= {"", "(silence)"}
        # vLLM takes part in the transfers of weights, and in nothing else that crosses the network.
        assert [held_by[port] for port in answers].count("VLLM::EngineCor") <= 1


def what_is_on_loopback_wants_a_token_or_is_nemo_gym(run: SlurmJob) -> None:
    """Seen by another user of the rollout node."""
    host = run.host("rollout-0")
    (found,) = scans.scan(run.cluster, host, ["127.0.0.1"], user=scans.ANOTHER_USER).values()
    (policy,) = [port for port in found if is_policy_endpoint(run, host, port, found[port])]
    chat = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
    assert scans.request(run.cluster, host, policy, "/v1/chat/completions", chat) == 403
    assert scans.request(run.cluster, host, policy, "/v1/chat/completions", {**chat, "hpc_gym_rollout": "x"}) == 403
    # Ray's dashboard starts jobs, for whoever may.
    assert 8265 in found
    for path, body in (("/api/jobs/", {"entrypoint": "id"}), ("/api/jobs/", None), ("/nodes?view=summary", None)):
        assert scans.request(run.cluster, host, 8265, path, body) == 401


def is_policy_endpoint(run: SlurmJob, host: str, port: int, said: str) -> bool:
    """Whether a port is that of the rollout server on loopback, which serves nothing at /."""
    return said == "HTTP/1.1 404 Not Found" and scans.request(run.cluster, host, port, "/v1/models") == 200
