"""What a person sees of jobs on Slurm: why they wait, how they go on after a loss, and all of that in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster import Cluster
from slurm_jobs import FOREVER, SlurmJob, service, task

from hpc_gym.jobs.records import JobRecord
from hpc_gym.protocol.attempt import Outcome

Submit = Callable[..., SlurmJob]

HPC_GYM = [sys.executable, "-m", "hpc_gym.cli.main"]
# As `submit --follow`, of a job that was submitted by other means.
FOLLOW = """
import sys
from hpc_gym.cli.live import follow_job
from hpc_gym.jobs.records import find
sys.exit(follow_job(find(sys.argv[1]), with_logs=True))
"""
# Makes a step a second, says when it wrote a line, and ends well in its second life.
TRAINER = """
import json, os, signal, sys, time
attempt, step = int(os.environ['HPC_GYM_ATTEMPT']), 0
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))
while attempt == 1 or step < 3:
    step += 1
    line = {'attempt': attempt, 'step': step, 'time': time.time(), 'reward/sums': step / 100}
    if 'rank-0' in os.environ['HPC_GYM_PROCESS']:
        with open(os.environ['HPC_GYM_RUN_DIR'] + '/metrics.jsonl', 'a') as file:
            file.write(json.dumps(line) + '\\n')
    print(f'step {step}/99 reward 0.5 written {time.time():.3f}', flush=True)
    time.sleep(1)
"""


def environment(run: SlurmJob) -> dict[str, str]:
    return {**os.environ, "HPC_GYM_RUNS": str(run.run_dir.parent), "XDG_STATE_HOME": str(run.run_dir.parent / "state")}


def hpc_gym(run: SlurmJob, *arguments: str) -> str:
    command = [*HPC_GYM, *arguments]
    return subprocess.run(command, env=environment(run), capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_job_that_waits_says_why_and_until_when_and_ctrl_c_leaves_it_alone(
    submit: Submit, slurm_cluster: Cluster
) -> None:
    slurm_cluster.slurm("sbatch", "-N5", "--exclusive", "-t5", "-o/dev/null", "--wrap", "sleep 300")
    waits = submit([task("rank-0", FOREVER)])

    def why() -> str:
        status = json.loads(hpc_gym(waits, "status", waits.run_dir.name, "--json"))
        return str(status["waiting"]) if status["state"] == "PENDING" else ""

    told = waits.until(lambda: "expected start" in (said := why()) and said)
    assert told.startswith("Resources (for nodes to become free), expected start 20")
    assert "PENDING (Resources)" in hpc_gym(waits, "list")
    command = [sys.executable, "-c", FOLLOW, waits.run_dir.name]
    with subprocess.Popen(command, env=environment(waits), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as view:
        assert view.stdout is not None
        assert b"queued: running, Resources" in view.stdout.readline()
        view.send_signal(signal.SIGINT)
        _, said = view.communicate(timeout=20)
    assert view.returncode == 130
    assert f"job {waits.id} goes on. Look again: hpc-gym status {waits.run_dir.name} --follow".encode() in said
    assert waits.job.get_info()["State"] == "PENDING"


def test_followed_logs_and_stages_survive_the_loss_of_a_node_and_one_line_tells_of_it(
    submit: Submit, tmp_path: Path
) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", TRAINER)], [task("rank-1", TRAINER)])
    name, seen = run.run_dir.name, tmp_path / "seen"
    with (tmp_path / "stages").open("wb") as stages, seen.open("wb") as lines:
        follow = [sys.executable, "-c", FOLLOW, name]
        view = subprocess.Popen(follow, env=environment(run), stdout=stages)
        # A clock beside every line as it comes out.
        clock = "import sys, time\nfor line in sys.stdin: print(f'{time.time():.3f}', line, end='', flush=True)"
        logs = subprocess.Popen([*HPC_GYM, "logs", name, "--follow"], env=environment(run), stdout=subprocess.PIPE)
        clocked = subprocess.Popen([sys.executable, "-c", clock], stdin=logs.stdout, stdout=lines)
        run.all_started()
        run.until(lambda: (run.run_dir / "metrics.jsonl").exists())
        time.sleep(2)
        host = run.host("train-1")
        run.cluster.crash(host)
        assert view.wait(run.patience) == 0
        assert logs.wait(20) == clocked.wait(20) == 0
    written = [(line.split()[0], line.split()[-1]) for line in seen.read_text().splitlines() if "written" in line]
    assert max(float(came) - float(when) for came, when in written[-4:]) < 1.0
    assert "-- attempt 1 ended: TO BE REQUEUED: role train, node train-1" in seen.read_text()
    followed = (tmp_path / "stages").read_text()
    for told in ("checks: done", "rank-0: step 1/99", "node train-1 is silent", "attempt 2", f"job {run.id} COMPLETED"):
        assert told in followed
    (line,) = [line for line in hpc_gym(run, "status", name).splitlines() if line.startswith("attempt 1 ended at")]
    assert f"host {host}: no heartbeat for" in line
    assert "attempt 2 began" in line


def test_a_thousand_runs_some_of_them_living_are_listed_within_a_second(submit: Submit) -> None:
    run = submit([task("rank-0", FOREVER)])
    run.all_started()
    for number in range(1000):
        folder = run.run_dir.parent / f"past-{number}"
        attempt = folder / "attempts" / "1"
        attempt.mkdir(parents=True)
        (folder / "attempts" / "latest").symlink_to("1")
        # Of some, as of those that were cancelled in the queue, only Slurm could tell.
        if number % 50:
            Outcome("completed").write(folder, attempt)
        past = JobRecord.read(run.run_dir)
        replace(past, run_dir=str(folder), name=folder.name, job_id=str(100 + number), submitted=float(number)).write()
    took = []
    for _ in range(5):
        begin = time.monotonic()
        told = json.loads(hpc_gym(run, "list", "--limit", "0", "--json"))
        took.append(time.monotonic() - begin)
    states = [each["state"] for each in told]
    assert (len(states), states[0]) == (1001, "RUNNING")
    assert (states.count("COMPLETED"), states.count("UNKNOWN")) == (980, 20)
    run.figure("list of 1,001 runs, with squeue and sacct", min(took), within=1.0)
    begin = time.monotonic()
    assert json.loads(hpc_gym(run, "status", "--json"))["state"] == "RUNNING"
    run.figure("status among 1,001 runs, with squeue", time.monotonic() - begin, within=1.0)
