"""The judge on the real parts: two vLLM servers with random models, and NeMo Gym's `math_with_judge`, unmodified."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest
import yaml
from judged_node import JudgedNode, judged_node, judged_requests, wait_ready
from rollout_node import TOKEN

from hpc_gym.protocol.client import RolloutClient
from hpc_gym.protocol.trajectory import Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgedNode]:
    with judged_node(JudgedNode, tmp_path_factory.mktemp("judged")) as running:
        yield running


@pytest.fixture(scope="module")
def client(node: JudgedNode) -> Iterator[RolloutClient]:
    with node.client() as connected:
        said = wait_ready(node, connected)
        assert "judge loading" in said[0], "a node is not ready before its judge is"
        yield connected


def test_math_with_judge_is_rewarded_by_the_judge_and_asks_it_through_the_rollout_server(
    node: JudgedNode, client: RolloutClient
) -> None:
    requests = judged_requests()
    (before,) = client.health()
    trajectories = client.run(requests)
    (after,) = client.health()
    assert [each.reason for each in trajectories if each.outcome is Outcome.FAILED] == [], node.log("gym")[-3000:]
    assert [each.reward for each in trajectories] == [1.0] * len(requests), "only the judge finds such answers right"
    # Each answer is judged twice, in both orders.
    assert after.judged - before.judged == 2 * len(requests)


def test_the_judge_is_frozen_and_reached_by_its_socket_alone(node: JudgedNode, client: RolloutClient) -> None:
    judge = psutil.Process(node.processes["judge"].pid)
    processes = [judge, *judge.children(recursive=True)]
    listening = [each for process in processes for each in process.net_connections("inet") if each.status == "LISTEN"]
    assert [each.laddr for each in listening if each.laddr.ip not in ("127.0.0.1", "::1")] == []
    asked = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", str(node.private / "judge.sock")]
    update = subprocess.run([*asked, "-X", "POST", "http://judge/update_weights"], capture_output=True, timeout=20)
    assert update.stdout == b"404", "without dev mode there is nothing to update weights with"


def test_no_command_line_of_the_node_holds_a_secret(node: JudgedNode, client: RolloutClient) -> None:
    lines = []
    for started in node.processes.values():
        parent = psutil.Process(started.pid)
        for each in [parent, *parent.children(recursive=True)]:
            lines.append(" ".join(each.cmdline()))
    assert any("judge.sock" in line for line in lines)
    assert not [line for line in lines if TOKEN in line]
    settings = yaml.safe_load((node.folder / "gym" / "rollout-0.yaml").read_text())
    assert settings["judge_api_key"] == settings["policy_api_key"]
