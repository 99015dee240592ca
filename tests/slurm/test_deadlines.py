"""Time that runs out: nothing moves any more, a server hangs, checkpoints take longer than a time limit leaves."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from slurm_jobs import FOREVER, SlurmJob, outcome_of, resumed, service, task

from hpc_gym.plan.plan import Probe

Submit = Callable[..., SlurmJob]

# Serves metrics beside its probe, as vLLM does, on a socket in its private directory.
METRICS_SERVER = """
import http.server, os, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(b'vllm:num_requests_running 7.0' if self.path == '/metrics' else b'')
    def address_string(self): return ''
socketserver.ThreadingUnixStreamServer('server.sock', Handler).serve_forever()
"""


@pytest.mark.parametrize("on_stall", ["stop", "requeue"])
def test_a_job_that_lives_but_does_not_move_is_ended_with_the_stacks_of_its_processes(
    submit: Submit, on_stall: str
) -> None:
    stalls = """
import json, os, sys, time
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
def waits_for_ever():
    while True: time.sleep(1)
for step in range(1, 6):
    row = {"attempt": 1, "step": step, "max_steps": 100, "time": time.time()}
    if os.environ['HPC_GYM_PROCESS'].endswith('rank-0'):
        open(os.environ["HPC_GYM_RUN_DIR"] + "/metrics.jsonl", "a").write(json.dumps(row) + "\\n")
    time.sleep(0.2)
waits_for_ever()
"""
    server = service("server", METRICS_SERVER, ready=Probe("http", "server.sock", "/health"), alive_within_s=60.0)
    ranks = [[task(f"rank-{rank}", stalls)] for rank in range(2)]
    run = submit([server], *ranks, stall_factor=5.0, stall_at_least_s=3.0, on_stall=on_stall)
    outcome = outcome_of(run)
    last = max(json.loads(line)["time"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines())
    run.figure("no step for 3 s: stacks are kept, the attempt has ended", outcome["time"] - last, within=20)
    assert "no training step and no rollout for" in outcome["sentence"]
    evidence = {file.name: file.read_text() for file in (run.attempt(1) / "stall").iterdir()}
    for rank in range(2):
        assert "waits_for_ever" in evidence[f"train-{rank}-rank-{rank}.log"]
    assert "vllm:num_requests_running 7.0" in evidence["rollout-0-server.log"]
    assert "the last lines of" in evidence["rollout-0-server.log"]
    if on_stall == "requeue":
        assert outcome["kind"] == "requeue"
        resumed(run, "it stalled", outcome["time"])
        return
    run.freed(60)
    assert run.job.state == "FAILED"
    assert "process all ranks failed: no training step" in run.output().splitlines()[-1]
    assert run.left() == {}


SAVES_SLOWLY = """
import os, sys, time
from pathlib import Path
from hpc_gym.protocol.notify import notify
from hpc_gym.training.checkpoints import Checkpoints
from hpc_gym.training.stopping import StopSignal
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
stop = StopSignal()
checkpoints = Checkpoints(Path(os.environ['HPC_GYM_RUN_DIR']) / 'checkpoints', kept=2)
def save(step):
    notify(X_SAVING=1)
    checkpoints.path(step).mkdir(parents=True)
    time.sleep(8)
    checkpoints.mark_complete(step, 1, step, 8.0)
    notify(X_SAVING=0)
save(1)
while not stop.requested: time.sleep(0.1)
save(2)
sys.exit(85)
"""


def test_where_checkpoints_take_longer_than_the_margin_the_job_saves_sooner(submit: Submit) -> None:
    run = submit(
        [service("server", FOREVER)],
        [task("rank-0", SAVES_SLOWLY)],
        options={"time": 1},
        time_limit_margin_s=5.0,
        stop_within_s=5.0,
    )
    limit = run.until(lambda: run.events("joined"))[0]["time"] + 60
    outcome = outcome_of(run, within_s=150)
    run.figure("checkpoints take 8 s, the margin is 5 s: saved before the limit", 60 - (limit - outcome["time"]), 60)
    # Slurm's own notice may come up to a minute before its time (sbatch, --signal).
    ours, slurms = "the time limit is near, and a checkpoint has taken 8 s", "the job received SIGUSR2"
    assert ours in outcome["sentence"] or slurms in outcome["sentence"]
    assert (run.run_dir / "checkpoints" / "checkpoint-2" / "complete.json").exists()
    resumed(run, "it saved sooner than asked", outcome["time"])


DEAF = """
import os, signal, sys, time
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True: time.sleep(1)
"""


@pytest.mark.parametrize("restarts", [1, 0])
def test_a_server_that_lives_but_does_not_answer_is_started_again_or_ends_the_job(
    submit: Submit, restarts: int
) -> None:
    server = service(
        "server", METRICS_SERVER, ready=Probe("http", "server.sock", "/health"), alive_within_s=6.0, restarts=restarts
    )
    run = submit([server], [task("rank-0", DEAF)])
    run.until(lambda: run.events("ready", "server"))
    stopped = run.signal("rollout-0", "server", "STOP")
    if restarts:
        again = run.until(lambda: len(run.events("ready", "server")) == 2 and run.events("ready", "server")[1]["time"])
        run.figure("a server hangs (allowed: 6 s): ready again", again - stopped, within=30)
        assert "hung: no good answer" in run.events("restarting", "server")[0]["cause"]
        assert not run.events("outcome")
        return
    noticed = run.until(lambda: run.events("failed", "server"))[0]["time"]
    run.figure("a server hangs (allowed: 6 s): noticed", noticed - stopped, within=20)
    run.figure("a server hangs, a rank ignores SIGTERM: nodes free", run.freed() - noticed, within=10)
    assert run.job.state == "FAILED"
    assert "role rollout, node rollout-0, process server failed: hung: no good answer" in run.output().splitlines()[-1]
    assert run.left() == {}


SAVES_TOO_SLOWLY = """
import os, signal, sys, time
from hpc_gym.protocol.notify import notify
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
def save(*_):
    notify(X_SAVING=1)
    time.sleep(120)
signal.signal(signal.SIGUSR2, save)
while True: time.sleep(0.1)
"""


def test_a_save_that_outlasts_the_grace_of_a_preemption_is_given_up_before_slurm_kills(submit: Submit) -> None:
    run = submit(
        [service("server", FOREVER)],
        [task("rank-0", SAVES_TOO_SLOWLY)],
        options={"partition": "preempt"},
        time_limit_margin_s=100.0,
    )
    run.all_started()
    folders = run.private_dirs()
    run.cluster.slurm("sbatch", "-pgpu", "-N5", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    asked = run.until(lambda: run.events("saving", attempt=1))[0]["time"]
    outcome = outcome_of(run)
    grace, kill_wait = run.cluster.settings().grace, run.cluster.settings().kill_wait
    # Slurm looks every half minute whether the grace is over.
    within = grace + 30 + kill_wait
    run.figure(f"preempted with {grace} s of grace, a save takes longer: has stopped", outcome["time"] - asked, within)
    assert outcome["kind"] == "requeue"
    resumed(run, "preempted, a save was given up", outcome["time"])
    assert not [folder for folder in folders.values() if folder.exists()]
