"""A rollout node for tests: a real `vllm serve`, a real NeMo Gym and our rollout server, started and stopped together.

Two recorders stand in the way of the data and change nothing: one before the policy endpoint, which sees the chats NeMo
Gym sends, and one before vLLM, which sees the ids that it is asked to continue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from hpc_gym.plan import plan as plans
from hpc_gym.protocol.client import RolloutClient
from hpc_gym.protocol.secrets import Secrets, write_secrets
from hpc_gym.runtimes.build import build
from hpc_gym.runtimes.spec import spec_of

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "rollout_programs"
TOKEN = "a-token-for-this-test"
MAX_MODEL_LEN = 12288
ENVIRONMENTS = {
    "workplace_assistant": "environments/workplace_assistant/config.yaml",
    "reasoning_gym": "environments/reasoning_gym/config.yaml",
    "mcqa": "resources_servers/mcqa/configs/mcqa.yaml",
}
# Several turns of a required tool call take a busy machine long.
DEADLINES_S = {"workplace_assistant": 90, "reasoning_gym": 60, "mcqa": 30}


def nemo_gym_files() -> Path:
    """The site-packages that nemo-gym's environments lie in."""
    build(["gym"])
    return next(spec_of("gym").python.parents[1].glob("lib/python3.*/site-packages"))


def example_rows(environment: str) -> list[bytes]:
    """The rows that nemo-gym ships for it."""
    folder = nemo_gym_files() / "resources_servers" / environment / "data"
    return (folder / "example.jsonl").read_bytes().splitlines()


def make_model(folder: Path) -> Path:
    """A random model whose tokenizer knows the words of the example rows."""
    build(["train-cpu"])
    texts = folder.with_suffix(".txt")
    texts.write_bytes(b"\n".join(row for name in ENVIRONMENTS for row in example_rows(name)))
    program = [str(spec_of("train-cpu").python), str(PROGRAMS / "tiny_model.py"), str(folder), str(texts)]
    subprocess.run(program, check=True, env=_environment(), timeout=200)
    return folder


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"} | more


@dataclass
class Recorder:
    """Passes requests on and keeps (path, request, answer) of those with a JSON body."""

    seen: list[tuple[str, Any, Any]] = field(default_factory=list)

    async def start(self, target: str, socket_path: str | None, listen: int | str) -> web.AppRunner:
        connector = aiohttp.UnixConnector(socket_path) if socket_path else aiohttp.TCPConnector(limit=0)
        session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))

        async def handle(request: web.Request) -> web.Response:
            data = await request.read()
            headers = {"Content-Type": "application/json"}
            try:
                url = f"{target}{request.path_qs}"
                async with session.request(request.method, url, data=data, headers=headers) as answer:
                    body = await answer.read()
            except (aiohttp.ClientError, OSError):
                if request.transport is not None:
                    request.transport.close()
                return web.Response(status=502)
            if data and answer.status == 200:
                self.seen.append((request.path, json.loads(data), json.loads(body)))
            return web.Response(body=body, status=answer.status, content_type="application/json")

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handle)
        app.on_cleanup.append(lambda _: session.close())
        # A client that is gone must be gone for the server behind, too.
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site: web.BaseSite = (
            web.UnixSite(runner, listen) if isinstance(listen, str) else web.TCPSite(runner, "127.0.0.1", listen)
        )
        await site.start()
        return runner


class RolloutNode:
    """See the module. `vllm`, `gym` and `server` are the processes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        # Short: the path of a Unix socket has at most 107 characters.
        self.private = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
        self.chats, self.generations = Recorder(), Recorder()
        self.policy_port, self.gym_port, self.chat_port = _free_ports(3)
        self.gym_ports = _free_block(40)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.endpoint = "127.0.0.1:%d" % self.listener.getsockname()[1]  # noqa: UP031
        self.secrets = folder / "secrets.json"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._recorders: list[web.AppRunner] = []

    @property
    def vllm_socket(self) -> Path:
        """vLLM's own socket, behind the recorder."""
        return self.private / "real-vllm-0.sock"

    def start(self) -> None:
        write_secrets(self.secrets, Secrets(TOKEN))
        (self.folder / "plan.json").write_text(self.plan().to_json())
        self.start_vllm()
        self.start_gym()
        self.start_server()
        for recorder, target, path, listen in (
            (self.chats, f"http://127.0.0.1:{self.policy_port}", None, self.chat_port),
            (self.generations, "http://vllm", str(self.vllm_socket), str(self.private / "vllm-0.sock")),
        ):
            started = asyncio.run_coroutine_threadsafe(recorder.start(target, path, listen), self._loop)
            self._recorders.append(started.result(10))

    def start_vllm(self) -> None:
        build(["inference-cpu"])
        self.vllm_socket.unlink(missing_ok=True)
        vllm = str(spec_of("inference-cpu").python.with_name("vllm"))
        command = [vllm, "serve", str(self.model), "--uds", str(self.vllm_socket), "--served-model-name", "policy"]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
        command += ["--kv-cache-memory-bytes", "268435456", "--generation-config", "vllm", "--enable-scale-out"]
        command += ["--logprobs-mode", "processed_logprobs", "--enable-auto-tool-choice"]
        command += ["--tool-call-parser", "hermes", "--max-num-seqs", "64"]
        command += ["--worker-extension-cls", "hpc_gym.weights.worker.WorkerExtension"]
        command += ["--weight-transfer-config", '{"backend": "hpc_gym"}']
        self._start(
            "vllm",
            command,
            VLLM_SERVER_DEV_MODE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_HOST_IP="127.0.0.1",
            GLOO_SOCKET_IFNAME="lo",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            OMP_NUM_THREADS="1",
        )

    def start_gym(self) -> None:
        own = self.folder / "gym.yaml"
        settings = {
            "policy_base_url": f"http://127.0.0.1:{self.chat_port}/v1",
            "policy_api_key": "unused",
            "policy_model_name": "policy",
            "skip_venv_if_present": True,
            "uv_venv_dir": str(spec_of("gym").python.parents[1] / "servers"),
            "default_host": "127.0.0.1",
            "head_server": {"host": "127.0.0.1", "port": self.gym_port},
            "port_range_low": self.gym_ports,
            "port_range_high": self.gym_ports + 39,
        }
        own.write_text(json.dumps(settings))
        paths = ["responses_api_models/vllm_model/configs/vllm_model.yaml", *ENVIRONMENTS.values(), str(own)]
        gym = str(spec_of("gym").python.with_name("gym"))
        command = [gym, "env", "start", f"+config_paths=[{','.join(paths)}]"]
        command += [f"hydra.run.dir={self.private}/hydra", "hydra.output_subdir=null"]
        self._start(
            "gym",
            command,
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_TMPDIR=str(self.private),
            RAY_USAGE_STATS_ENABLED="0",
            PATH=f"{Path(gym).parent}:{os.environ['PATH']}",
        )

    def start_server(self) -> None:
        command = [sys.executable, "-m", "hpc_gym.rollout.server", "--run-dir", str(self.folder), "--node", "rollout-0"]
        command += ["--fd", str(self.listener.fileno()), "--policy-port", str(self.policy_port)]
        command += ["--gym-port", str(self.gym_port), "--private-dir", str(self.private)]
        command += ["--secrets", str(self.secrets)]
        self._start("server", command, pass_fds=(self.listener.fileno(),))

    def _start(self, name: str, command: list[str], pass_fds: tuple[int, ...] = (), **env: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=_environment(**env),
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=pass_fds,
                cwd=self.private,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def client(self, token: str = TOKEN) -> RolloutClient:
        return RolloutClient([self.endpoint], token, gone_after_s=60)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Ends a process and all of its group."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait(20)

    def stop(self) -> None:
        for name in list(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[name].pid, signal.SIGTERM)
        for name, process in list(self.processes.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(8)
            self.kill(name)
        for runner in self._recorders:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.listener.close()
        subprocess.run(["rm", "-rf", str(self.private)], check=False)

    def plan(self) -> plans.Plan:
        """As much of a Plan as a rollout server reads."""
        sampling = plans.Sampling(1.0, 1.0, 64)
        return plans.Plan(
            name="test",
            run_dir=str(self.folder),
            seed=0,
            python=sys.executable,
            nodes=(),
            runtimes={},
            environments=tuple(
                plans.Environment(name, f"{name}_simple_agent", (path,), timeout_s=DEADLINES_S[name], max_attempts=2)
                for name, path in ENVIRONMENTS.items()
            ),
            rollout=plans.RolloutSettings("policy", MAX_MODEL_LEN, max_concurrent=64, replicas=1),
            training=plans.Training(
                method="grpo",
                model=str(self.model),
                grpo={},
                deepspeed={},
                prompts_per_step=1,
                world_size=1,
                max_staleness=0,
                sources=(),
                sampling=sampling,
                evaluation=plans.Evaluation((), False, False, 0, sampling, 1),
                weight_transfer="gloo",
                checkpoint_every=0,
                checkpoints_kept=1,
                wandb=None,
                on_policy_tolerance=0,
            ),
            launch=plans.Launch("local"),
            supervision=plans.Supervision(),
        )


@contextlib.contextmanager
def rollout_node(folder: Path) -> Iterator[RolloutNode]:
    """A running node; it may still be loading."""
    node = RolloutNode(folder, make_model(folder / "model"))
    try:
        node.start()
        yield node
    finally:
        node.stop()


def until(condition: Any, seconds: float, what: str) -> None:
    """Waits for something to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _free_block(count: int) -> int:
    for start in range(20000 + os.getpid() % 50 * 100, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(start, start + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return start
    raise AssertionError("no free block of ports")
