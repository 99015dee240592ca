"""The judge on the real parts: two vLLM servers with random models, and NeMo Gym's `math_with_judge`, unmodified. What
the Plan says is what is started.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from rollout_node import TOKEN, RolloutNode, example_rows, make_model

from hpc_gym.plan.plan import Plan, Process
from hpc_gym.plan.resolve import plan_for
from hpc_gym.protocol.client import RolloutClient, RolloutServerError
from hpc_gym.protocol.messages import RolloutRequest, Sampling
from hpc_gym.protocol.secrets import Secrets, write_secrets
from hpc_gym.protocol.trajectory import Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

VERDICT = "[[A=B]]"
# The judge is random too, so what it says is chosen for it: that any answer is right, which the verifier never finds.
EXPERIMENT = f"""\
extends: [clusters/local, environments/math_with_judge]
name: judged
nodes: {{rollout: 1, train: 1}}
model: {{path: model, dtype: float32}}
data: {{train: [{{environment: math_with_judge, path: rows.jsonl}}]}}
vllm: {{max_model_len: 4096, enforce_eager: true, kv_cache_memory_bytes: 134217728}}
rollouts: {{max_output_tokens: 32}}
grpo: {{max_steps: 1, num_generations: 2, per_device_train_batch_size: 2}}
judge:
  model: model
  vllm: {{max_model_len: 4096, dtype: float32, enforce_eager: true, kv_cache_memory_bytes: 134217728}}
environments:
  math_with_judge:
    config:
      math_with_judge:
        resources_servers:
          math_with_judge:
            should_use_judge: true
            judge_model_server: {{type: responses_api_models, name: judge_model}}
            judge_responses_create_params:
              input: []
              max_output_tokens: 16
              metadata: {{extra_body: '{{"structured_outputs": {{"choice": ["{VERDICT}"]}}}}'}}
"""


class JudgedNode(RolloutNode):
    """The rollout node of a Plan: its own commands, with the placeholders filled in."""

    def start(self) -> None:
        (self.folder / "rows.jsonl").write_bytes(b"\n".join(example_rows("math_with_judge")))
        (self.folder / "judged.yaml").write_text(EXPERIMENT)
        plan = replace(plan_for(self.folder / "judged.yaml"), run_dir=str(self.folder))
        (self.folder / "plan.json").write_text(plan.to_json())
        write_secrets(self.secrets, Secrets(TOKEN))
        for process in plan.nodes[0].processes:
            self._run(plan, process)

    def _run(self, plan: Plan, process: Process) -> None:
        runtime = plan.runtimes[process.runtime]
        for file in process.files:
            path = Path(self._fill(file.path, runtime.python))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._fill(file.text, runtime.python))
        argv = [self._fill(each, runtime.python) for each in process.argv]
        programs = Path(runtime.python).parent
        if (programs / argv[0]).exists():
            argv[0] = str(programs / argv[0])
        env = {name: self._fill(text, runtime.python) for name, text in process.env.items()}
        descriptors = (self.listener.fileno(),) if process.listen else ()
        self._start(process.name, argv, descriptors, **env, PATH=f"{programs}:/usr/local/bin:/usr/bin:/bin")

    def _fill(self, text: str, python: str) -> str:
        values = {
            "{python}": python,
            "{run_dir}": str(self.folder),
            "{attempt_dir}": str(self.folder),
            "{node}": "rollout-0",
            "{private_dir}": str(self.private),
            "{interface}": "lo",
            "{secrets}": str(self.secrets),
            "{fd:rollout-0}": str(self.listener.fileno()),
            "{port:policy}": str(self.policy_port),
            "{port:gym-head}": str(self.gym_port),
            "{port:gym}": str(self.gym_ports),
            "{port:gym+99}": str(self.gym_ports + 39),
        }
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        return text


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgedNode]:
    folder = tmp_path_factory.mktemp("judged")
    started = JudgedNode(folder, make_model(folder / "model"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def client(node: JudgedNode) -> Iterator[RolloutClient]:
    with node.client() as connected:
        said: list[str] = []
        try:
            connected.wait_ready(200, said.append)
        except RolloutServerError as error:
            logs = "\n".join(f"--- {name}\n{node.log(name)[-2500:]}" for name in node.processes)
            pytest.fail(f"{error}\n{logs}")
        assert "judge loading" in said[0], "a node is not ready before its judge is"
        yield connected


def test_math_with_judge_is_rewarded_by_the_judge_and_asks_it_through_the_rollout_server(
    node: JudgedNode, client: RolloutClient
) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_output_tokens=32)
    requests = [
        RolloutRequest(environment="math_with_judge", row=row, group=group, sampling=sampling)
        for group, row in enumerate(example_rows("math_with_judge"))
        for _ in range(2)
    ]
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
