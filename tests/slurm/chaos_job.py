"""The job that the chaos tests disturb: a server, and two ranks that train together, save as the trainer does, and fail
of one another as ranks do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_jobs import FOREVER, SlurmJob, service, task

from hpc_gym.training.checkpoints import Checkpoints
from hpc_gym.training.metrics import read_lines

STEPS, EVERY = 12, 2
"""Steps of the training, and steps between two checkpoints."""
SERVER = "server"
HETEROGENEOUS = ({"nodes": 1, "partition": "gpu"}, {"nodes": 2, "partition": "gpu", "gpus_per_node": 2})

TRAINER = f"""
import contextlib, os, socket, subprocess, sys, time
from pathlib import Path
from hpc_gym.protocol.notify import notify
from hpc_gym.training.checkpoints import Checkpoints
from hpc_gym.training.metrics import append_line
from hpc_gym.training.stopping import StopRequested, StopSignal

STEPS, EVERY = {STEPS}, {EVERY}
stop = StopSignal()
run_dir, attempt = Path(os.environ['HPC_GYM_RUN_DIR']), int(os.environ['HPC_GYM_ATTEMPT'])
loader = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
meeting = run_dir / 'attempts' / str(attempt) / 'meeting'

def save(step):
    notify(X_SAVING=1)
    folder = checkpoints.path(step)
    folder.mkdir(parents=True)
    for half in range(2):
        with (folder / 'weights').open('ab') as file:
            file.write(bytes([step]) * 4096)
        time.sleep(0.3)
    checkpoints.mark_complete(step, 2, step, 0.6)
    notify(X_SAVING=0)
"""

RANK_0 = """
listener = socket.create_server((os.environ['HPC_GYM_ADDRESS'], 0))
(meeting.parent / '.meeting').write_text(':'.join(map(str, listener.getsockname()[:2])))
(meeting.parent / '.meeting').rename(meeting)
checkpoints = Checkpoints(run_dir / 'checkpoints', kept=1000)
checkpoints.remove_torn()
step = max((each.step for each in checkpoints.complete()), default=0)
print('resumed from', step, flush=True)
peer, _ = listener.accept()
peer.setblocking(False)
while step < STEPS:
    with contextlib.suppress(StopRequested), stop.interruptible():
        time.sleep(0.4)
    with contextlib.suppress(BlockingIOError):
        if not peer.recv(1):
            raise ConnectionError('gloo: Connection closed by peer')
    if loader.poll() is not None:
        raise RuntimeError('the loader of the data has died')
    if stop.requested:
        if not checkpoints.is_complete(step):
            save(step)
        peer.sendall(b's')
        sys.exit(85)
    step += 1
    append_line(run_dir / 'metrics.jsonl', {'attempt': attempt, 'step': step, 'max_steps': STEPS, 'time': time.time()})
    if step % EVERY == 0:
        save(step)
loader.kill()
peer.sendall(b'd')
"""

RANK_1 = """
while not meeting.exists():
    time.sleep(0.05)
host, _, port = meeting.read_text().rpartition(':')
link = socket.create_connection((host, int(port)))
link.settimeout(0.2)
while True:
    if loader.poll() is not None:
        raise RuntimeError('the loader of the data has died')
    with contextlib.suppress(TimeoutError):
        said = link.recv(1)
        if not said:
            raise ConnectionError('gloo: Connection closed by peer')
        loader.kill()
        sys.exit(85 if said == b's' else 0)
"""


def submitted(submit: Callable[..., SlurmJob], heterogeneous: bool, folder: Path | None) -> SlurmJob:
    """The job, just submitted."""
    ranks = [
        task(f"rank-{rank}", TRAINER + code, env={"HPC_GYM_ADDRESS": "{address}"})
        for rank, code in enumerate((RANK_0, RANK_1))
    ]
    return submit(
        [service(SERVER, FOREVER, restarts=1)],
        *[[rank] for rank in ranks],
        components=HETEROGENEOUS if heterogeneous else (),
        folder=folder,
        max_steps=STEPS,
    )


def rows(run: SlurmJob) -> list[tuple[int, int]]:
    """(attempt, step) of each row of the metrics."""
    return [(int(row["attempt"]), int(row["step"])) for row in read_lines(run.run_dir / "metrics.jsonl")]


def saving(run: SlurmJob) -> bool:
    """Whether a checkpoint is being written, or was torn."""
    folders = list((run.run_dir / "checkpoints").glob("checkpoint-*"))
    return any(not (folder / "complete.json").exists() for folder in folders)


def wrong_with_the_steps(run: SlurmJob, completed: bool) -> list[str]:
    """What is lost, doubled or torn of the training."""
    found, seen = [], rows(run)
    for number in sorted({attempt for attempt, _ in seen}):
        steps = [step for attempt, step in seen if attempt == number]
        if steps != list(range(steps[0], steps[0] + len(steps))):
            found.append(f"attempt {number} has the steps {steps}")
        before = max((step for attempt, step in seen if attempt < number), default=0)
        if not before - EVERY < steps[0] <= before + 1:
            found.append(f"attempt {number} began with step {steps[0]}, the one before had come to {before}")
    if sorted(attempt for attempt, _ in seen) != [attempt for attempt, _ in seen]:
        found.append(f"attempts wrote at the same time: {seen}")
    if completed and (not seen or seen[-1][1] != STEPS):
        found.append(f"it is complete after {seen[-1:]} of {STEPS} steps")
    for checkpoint in Checkpoints(run.run_dir / "checkpoints", kept=1000).complete():
        weights = (checkpoint.path / "weights").read_bytes()
        if len(weights) != 2 * 4096 or set(weights) != {checkpoint.step}:
            found.append(f"{checkpoint.path} counts as whole and is not")
    return found


def first_failure(run: SlurmJob) -> dict[str, Any]:
    """failure.json of the run; empty where there is none."""
    path = run.run_dir / "failure.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
