"""Ready means that our own process answers, within its deadline; alive, that it goes on doing so."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import small_jobs
from small_jobs import FOREVER, Job, ended_within, service, task

from hpc_gym.plan.plan import ConfigFile, Link, Probe, Process

MakeJob = Callable[..., Job]
job = small_jobs.job
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

# A head server as NeMo Gym's, which lists itself as the only server.
HEAD = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port = int(sys.argv[1])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({'status': 'ok'})
        if self.path == '/server_instances':
            body = json.dumps([{'name': 'agent', 'pid': os.getpid(), 'url': f'http://127.0.0.1:{port}'}])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())
print('serving', flush=True)
HTTPServer(('127.0.0.1', port), Handler).serve_forever()
"""
UNIX_SERVER = """
import os, socket, socketserver, sys, time
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        if os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/freeze'):
            time.sleep(600)
        self.wfile.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n')
time.sleep(0.5)
socketserver.ThreadingUnixStreamServer(os.environ['TMPDIR'] + '/vllm-0.sock', Handler).serve_forever()
"""
WAITS_FOR = """
import os, time
while not os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/enough'):
    time.sleep(0.05)
"""


def head(*argv: str, **fields: object) -> Process:
    made = service("gym", HEAD, ready=Probe("gym", "gym-head"), ports=("gym-head",), **fields)
    return replace(made, argv=(*made.argv, *argv))


@contextmanager
def somebody_elses_server() -> Iterator[int]:
    """A head server of another job; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", HEAD, str(port)], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        yield port
    finally:
        server.kill()
        server.communicate()


def test_nemo_gym_is_ready_when_its_own_servers_answer(job: MakeJob) -> None:
    run = job([head("{port:gym-head}")], [task("rank-0", WAITS_FOR)]).start()
    run.until(lambda: run.events("ready", "gym"))
    (run.run_dir / "enough").touch()
    assert run.wait() == 0


def test_a_port_that_another_job_answers_on_is_not_ready(job: MakeJob) -> None:
    with somebody_elses_server() as port:
        # Ours is alive, and the port answers as it should: but it is not ours that answers.
        impostor = service("gym", FOREVER, ready=Probe("gym", str(port)), ready_within_s=3.0)
        run = job([impostor], [task("rank-0", FOREVER)]).start()
        assert run.wait() == 1
    assert not run.events("ready", "gym")
    assert run.failure().cause.startswith(
        f"not ready within 3 s: port {port} is answered by servers that are not ours: agent"
    )


def test_a_server_on_a_unix_socket_is_ready_when_it_answers_and_hung_when_it_no_longer_does(job: MakeJob) -> None:
    probe = Probe("http", "vllm-0.sock", "/health")
    run = job(
        [service("vllm-0", UNIX_SERVER, ready=probe, ready_within_s=20.0, alive_within_s=2.0)],
        [task("rank-0", FOREVER)],
    ).start()
    ready = run.until(lambda: run.events("ready", "vllm-0"))[0]
    assert ready["seconds"] >= 0.5
    (run.run_dir / "freeze").touch()
    frozen = time.time()
    assert run.wait() == 1
    assert run.failure().process == "vllm-0"
    assert run.failure().cause.startswith("hung: no good answer for")
    assert 2.0 <= run.events("hung", "vllm-0")[0]["time"] - frozen < 12


def test_a_server_that_closed_its_socket_but_waits_for_its_clients_is_not_waited_for(job: MakeJob) -> None:
    # As vLLM does when its engine has died.
    closes = (
        UNIX_SERVER.replace("time.sleep(0.5)", "import threading")
        .replace(".serve_forever()", "")
        .replace("socketserver.Threading", "server = socketserver.Threading")
    )
    closes += """
threading.Thread(target=server.serve_forever, daemon=True).start()
while not os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/close'):
    time.sleep(0.05)
server.shutdown()
server.server_close()
print('EngineDeadError: the engine is gone', flush=True)
time.sleep(600)
"""
    made = service("vllm-0", closes, ready=Probe("http", "vllm-0.sock"), ready_within_s=20.0, alive_within_s=300.0)
    run = job([made], [task("rank-0", FOREVER)]).start()
    run.until(lambda: run.events("ready", "vllm-0"))
    (run.run_dir / "close").touch()
    closed = time.time()
    assert run.wait() == 1
    assert run.failure().cause == "it closed its socket and does not end: EngineDeadError: the engine is gone"
    assert ended_within(run, closed, 20.0)


def test_a_hung_service_is_restarted_where_it_may_be_and_its_old_socket_is_no_obstacle(job: MakeJob) -> None:
    probe = Probe("http", "vllm-0.sock", "/health")
    served = service("vllm-0", UNIX_SERVER, ready=probe, ready_within_s=20.0, alive_within_s=2.0, restarts=1)
    run = job([served], [task("rank-0", WAITS_FOR)]).start()
    run.until(lambda: run.events("ready", "vllm-0"))
    (run.run_dir / "freeze").touch()
    run.until(lambda: run.events("restarting", "vllm-0"))
    (run.run_dir / "freeze").unlink()
    run.until(lambda: len(run.events("ready", "vllm-0")) == 2)
    (run.run_dir / "enough").touch()
    assert run.wait() == 0


def test_nemo_gym_is_started_again_at_once_when_one_of_its_servers_dies(job: MakeJob) -> None:
    behind = HEAD.replace("print(", "import subprocess; server = subprocess.Popen(['sleep', '600'])\nprint(")
    made = head("{port:gym-head}", ready_within_s=20.0, alive_within_s=300.0, restarts=1)
    made = replace(made, argv=tuple(behind.replace("os.getpid()", "server.pid") if a == HEAD else a for a in made.argv))
    run = job([made], [task("rank-0", WAITS_FOR)]).start()
    run.until(lambda: run.events("ready", "gym"))
    server = next(each for each in psutil.Process(run.pid("gym")).children() if each.name() == "sleep")
    server.kill()
    killed = time.time()
    again = run.until(lambda: run.events("restarting", "gym"))[0]
    assert again["time"] - killed < 5
    assert again["cause"] == f"its server agent (pid {server.pid}) has died"
    run.until(lambda: len(run.events("ready", "gym")) == 2)
    (run.run_dir / "enough").touch()
    assert run.wait() == 0
    assert not run.events("hung", "gym")[1:]


def test_a_rank_that_failed_and_hangs_in_its_teardown_is_not_waited_for(job: MakeJob) -> None:
    hangs = """
import time
from hpc_gym.protocol.notify import notify
notify(READY=1)
time.sleep(1)
notify(X_FAILURE='ValueError: no such reward')
time.sleep(600)
"""
    run = job([task("rank-0", hangs, ready=Probe("notify"), alive_within_s=1800.0)], [task("rank-1", FOREVER)]).start()
    complained = run.until(lambda: run.events("complained", "rank-0"))[0]["time"]
    assert run.wait() == 1
    assert (run.failure().process, run.failure().cause) == ("rank-0", "ValueError: no such reward")
    assert ended_within(run, complained, 15.0)


def test_a_deadline_that_passes_names_the_process_and_how_far_it_was(job: MakeJob) -> None:
    slow = "import time; from hpc_gym.protocol.notify import notify; notify(STATUS='loading 3 / 9'); time.sleep(600)"
    run = job([service("server", slow, ready=Probe("notify"), ready_within_s=2.0)], [task("rank-0", FOREVER)]).start()
    assert run.wait() == 1
    assert (run.failure().node, run.failure().process) == ("rollout-0", "server")
    assert run.failure().cause == "not ready within 2 s: loading 3 / 9"


def test_a_task_without_a_sign_of_life_is_named_as_hung(job: MakeJob) -> None:
    stalls = """
import time
from hpc_gym.protocol.notify import notify
notify(READY=1, STATUS='step 7 / 30')
for _ in range(10):
    notify(WATCHDOG=1)
    time.sleep(0.2)
time.sleep(600)
"""
    run = job([service("server", FOREVER)], [task("rank-0", stalls, ready=Probe("notify"), alive_within_s=1.5)]).start()
    assert run.wait() == 1
    assert run.failure().process == "rank-0"
    assert run.failure().cause.startswith("hung: no sign of life for")
    assert run.failure().cause.endswith("last status: step 7 / 30")
    assert run.events("status", "rank-0")[0]["text"] == "step 7 / 30"


def test_a_process_that_says_why_it_fails_is_quoted_even_if_it_never_exits(job: MakeJob) -> None:
    torn = """
import time
from hpc_gym.protocol.notify import notify
notify(X_FAILURE='weights diverged: mean |dlogp| 0.3 > 0.01')
time.sleep(600)
"""
    run = job([service("server", FOREVER)], [task("rank-0", torn)]).start()
    assert run.wait() == 1
    assert run.failure().cause == "weights diverged: mean |dlogp| 0.3 > 0.01"


def test_processes_find_each_other_through_placeholders_and_start_without_waiting(job: MakeJob) -> None:
    report = """
import json, os, socket, sys, time
listens = socket.socket(fileno=int(sys.argv[1])).getsockname()
print(json.dumps({'listens': listens, 'file': open(sys.argv[2]).read(), 'servers': os.environ['SERVERS']}))
time.sleep(600)
"""
    server = service("server", report, listen=("rollout-0",), ports=("gym*100",), ready=Probe("notify"))
    server = replace(
        server,
        argv=(*server.argv, "{fd:rollout-0}", "{private_dir}/linked/text/{node}.yaml"),
        env={"SERVERS": "{endpoints:rollout}"},
        files=(
            ConfigFile("{attempt_dir}/text/{node}.yaml", "low: {port:gym}\nhigh: {port:gym+99}\nkey: ${address}\n"),
        ),
        # The file is read through it.
        links=(Link("{private_dir}/linked/text", "{attempt_dir}/text"),),
    )
    # Rank 0 waits on the master port until rank 1, which starts late, has come.
    meet = """
import os, socket, time
address = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))
if os.environ['RANK'] == '0':
    socket.create_server(address).accept()
else:
    time.sleep(1)
    socket.create_connection(address).close()
for server in os.environ['SERVERS'].split(','):
    host, port = server.split(':')
    socket.create_connection((host, int(port))).close()
"""
    env = {
        "MASTER_ADDR": "{host:train-master}",
        "MASTER_PORT": "{portof:train-master}",
        "SERVERS": "{endpoints:rollout}",
    }
    run = job(
        [server],
        [task("rank-0", meet, env={**env, "RANK": "0"}, ports=("train-master",))],
        [task("rank-1", meet, env={**env, "RANK": "1"})],
    ).start()
    assert run.wait() == 0, run.output
    said = json.loads(run.log("rollout-0-server.log").split(" ", 1)[1])
    assert said["servers"] == f"127.0.0.1:{said['listens'][1]}"
    low, high, key = said["file"].splitlines()
    assert int(high.split()[1]) - int(low.split()[1]) == 99
    assert key == "key: ${address}"
    started = [event["time"] for event in run.events("started")]
    assert max(started) - min(started) < 5


def test_processes_get_the_secrets_and_no_more_of_the_environment_than_they_need(job: MakeJob, tmp_path: Path) -> None:
    show = "import json, os; print('ENV', json.dumps(dict(os.environ)))"
    run = job([task("rank-0", show)])
    plan = replace(run.plan, secrets=("WANDB_API_KEY",), env={"HF_HUB_OFFLINE": "1"})
    (run.run_dir / "plan.json").write_text(plan.to_json())
    run.start(
        {
            "WANDB_API_KEY": "planted-secret",
            "MY_BANK_PASSWORD": "x",
            "SOME_APP_TOKEN": "x",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )
    assert run.wait() == 0
    env = json.loads(run.log("train-0-rank-0.log").split("ENV ", 1)[1])
    assert env["WANDB_API_KEY"] == "planted-secret"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert not {"MY_BANK_PASSWORD", "SOME_APP_TOKEN", "PYTHONDONTWRITEBYTECODE"} & set(env)
    written = [path for path in run.run_dir.rglob("*") if path.is_file() and "code" not in path.parts]
    others = [path for path in written if path.name != "train-0-rank-0.log"]
    assert others
    assert not [path for path in others if b"planted-secret" in path.read_bytes()]
    assert "planted-secret" not in run.output
