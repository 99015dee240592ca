"""Nodes for tests of the judge: two vLLM servers with random models, and NeMo Gym's `math_with_judge`, unmodified. What
the Plan says is what is started.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rollout_node import TOKEN, RolloutNode, example_rows, make_model

from hpc_gym.node.context import NODE_TOKEN
from hpc_gym.plan.plan import Plan, Process
from hpc_gym.plan.resolve import plan_for
from hpc_gym.protocol.client import RolloutClient, RolloutServerError
from hpc_gym.protocol.messages import RolloutRequest, Sampling
from hpc_gym.protocol.secrets import Secrets, write_secrets

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
        plan = self.planned()
        make_token(self.private)
        for process in plan.nodes[0].processes:
            self._run(plan, process)

    def planned(self, *overrides: str) -> Plan:
        """The Plan, with all that its processes read written."""
        (self.folder / "rows.jsonl").write_bytes(b"\n".join(example_rows("math_with_judge")))
        (self.folder / "judged.yaml").write_text(EXPERIMENT)
        plan = replace(plan_for(self.folder / "judged.yaml", overrides), run_dir=str(self.folder))
        (self.folder / "plan.json").write_text(plan.to_json())
        write_secrets(self.secrets, Secrets(TOKEN))
        return plan

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
        for placeholder, value in self._values(python).items():
            text = text.replace(placeholder, value)
        return text

    def _values(self, python: str) -> dict[str, str]:
        return {
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


class JudgedNodes(JudgedNode):
    """The same with the judge and NeMo Gym on nodes of their own: one private directory and one listener each."""

    def start(self) -> None:
        more = ("nodes.judge=1", "judge.placement=nodes", "nodes.environment=1")
        plan = self.planned(*more)
        listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in ("judge-0", "environment-0")}
        self._listeners = {"rollout-0": self.listener, **listeners}
        for node in plan.nodes:
            if node.role == "train":
                continue
            self._node = node.name
            self._private = self.private / node.role
            self._private.mkdir(mode=0o700)
            make_token(self._private)
            for process in node.processes:
                # A process hands on the listener of its node.
                self.listener = self._listeners[node.name]
                self._run(plan, process)
        self.listener = self._listeners["rollout-0"]

    def stop(self) -> None:
        super().stop()
        for listener in self._listeners.values():
            listener.close()

    def _values(self, python: str) -> dict[str, str]:
        values = super()._values(python)
        for name, listener in self._listeners.items():
            port = listener.getsockname()[1]
            values[f"{{fd:{name}}}"] = str(listener.fileno())
            values[f"{{endpoints:{name.rpartition('-')[0]}}}"] = f"127.0.0.1:{port}"
        return values | {"{node}": self._node, "{private_dir}": str(self._private)}


def make_token(folder: Path) -> None:
    """What a supervisor makes for programs that want a token of their own."""
    (folder / NODE_TOKEN).write_text("a-token-of-this-node-of-some-length")


@contextlib.contextmanager
def judged_node(kind: type[JudgedNode], folder: Path) -> Iterator[JudgedNode]:
    """Running nodes; they may still be loading."""
    node = kind(folder, make_model(folder / "model"))
    try:
        node.start()
        yield node
    finally:
        node.stop()


def wait_ready(node: JudgedNode, client: RolloutClient) -> list[str]:
    said: list[str] = []
    try:
        client.wait_ready(200, said.append)
    except RolloutServerError as error:
        logs = "\n".join(f"--- {name}\n{node.log(name)[-2500:]}" for name in node.processes)
        pytest.fail(f"{error}\n{logs}")
    return said


def judged_requests() -> list[RolloutRequest]:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_output_tokens=32)
    return [
        RolloutRequest(environment="math_with_judge", row=row, group=group, sampling=sampling)
        for group, row in enumerate(example_rows("math_with_judge"))
        for _ in range(2)
    ]
