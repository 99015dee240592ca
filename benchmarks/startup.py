"""How long a job takes to its first rollout, against what no job could beat on this machine.

    python benchmarks/startup.py

Starts the demo's job, then each of its components alone, all by the same supervisors. No job can be faster than its
slowest component alone, nor than the CPU time that its start takes, divided by the cores. Needs the demo's model and
data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results import record

from hpc_gym.node import tree
from hpc_gym.plan.plan import Node, Plan, Process

WITHIN = 1.15
LONGEST_S = 600.0
FIRST_ROLLOUT = re.compile(r"rollouts [1-9]\d*/")
SLEEP = ("{python}", "-c", "import time; time.sleep(3600)")


@dataclass(frozen=True)
class Start:
    """From the start of a job's script to a moment of its life: wall and CPU seconds of everything in it."""

    seconds: float
    cpu_seconds: float
    others_cpu_seconds: float
    """What the rest of the machine took of its cores meanwhile: a measurement counts when that is little."""


class CpuMeter:
    """CPU time of a process and all below it, those that have ended meanwhile included up to the last look."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._used: dict[tuple[int, int], float] = {}

    def look(self) -> float:
        table = tree.processes()
        procs = [*tree.descendants([self._pid], table), *([table[self._pid]] if self._pid in table else [])]
        for proc in procs:
            try:
                text = Path(f"/proc/{proc.pid}/stat").read_bytes()
            except OSError:
                continue
            own = sum(int(field) for field in text[text.rindex(b")") + 2 :].split()[11:13])
            self._used[proc.pid, proc.start] = own / os.sysconf("SC_CLK_TCK")
        return sum(self._used.values())


def machine_cpu_seconds() -> float:
    """CPU time that all programs of this machine have used since its start, and what its host took away."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def events(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / "attempts/latest/events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def measure(run_dir: Path, reached: Callable[[list[dict[str, Any]]], float | None]) -> Start:
    """Runs the job in `run_dir` until `reached(events)` gives the moment of it, then stops it in good order."""
    code = f"{run_dir}/code"
    script = f'exports="$({sys.executable} -m hpc_gym.node.attempt {run_dir})"; eval "$exports"; '
    script += f"exec {sys.executable} -m hpc_gym.node.local_nodes {run_dir}"
    environment = {**os.environ, "PYTHONPATH": code}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began, busy_before = time.time(), machine_cpu_seconds()
    job = subprocess.Popen(["bash", "-euc", script], env=environment, stdout=subprocess.PIPE, text=True)
    meter = CpuMeter(job.pid)
    try:
        while time.time() - began < LONGEST_S:
            used = meter.look()
            if (moment := reached(events(run_dir))) is not None:
                return Start(moment - began, used, machine_cpu_seconds() - busy_before - used)
            if job.poll() is not None:
                break
            time.sleep(0.25)
    finally:
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
    raise SystemExit(f"{run_dir}: the job did not get so far: {output.strip()}")


def first_rollout(found: list[dict[str, Any]]) -> float | None:
    return next((e["time"] for e in found if e["event"] == "status" and FIRST_ROLLOUT.search(e["text"])), None)


def all_ready(*processes: str) -> Callable[[list[dict[str, Any]]], float | None]:
    def reached(found: list[dict[str, Any]]) -> float | None:
        moments = {e["process"]: e["time"] for e in found if e["event"] == "ready"}
        return max(moments[name] for name in processes) if set(processes) <= set(moments) else None

    return reached


def all_waiting(*processes: str) -> Callable[[list[dict[str, Any]]], float | None]:
    """Trainers are done with their own start when they wait for the rollout servers."""

    def reached(found: list[dict[str, Any]]) -> float | None:
        moments: dict[str, float] = {}
        for event in found:
            if event["event"] == "status" and event["text"].startswith("waiting"):
                moments.setdefault(event["process"], event["time"])
        return max(moments[name] for name in processes) if set(processes) <= set(moments) else None

    return reached


def submitted(folder: Path) -> Plan:
    """The demo's Plan with one step, as `hpc-gym submit` writes it; what it started is stopped again."""
    command = [str(Path(sys.executable).with_name("hpc-gym")), "submit", "demo", "name=startup", "grpo.max_steps=1"]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    subprocess.run([*command, "data.eval=[]", "checkpoints.every=1"], cwd=folder, env=environment, check=True)
    (run_dir,) = [path.parent for path in folder.rglob("job.sh")]
    subprocess.run([command[0], "cancel", str(run_dir)], env=environment, check=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (run_dir / "attempts/latest/outcome.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return Plan.read(run_dir)


def cut(plan: Plan, folder: Path, name: str, keep: Callable[[Process], Process | None]) -> Path:
    """A run directory for what `keep` leaves of the plan, plus a task that lets it live."""
    run_dir = folder / name
    run_dir.mkdir()
    (run_dir / "code").symlink_to(f"{plan.run_dir}/code")
    nodes: list[Node] = []
    for node in plan.nodes:
        if kept := tuple(process for each in node.processes if (process := keep(each)) is not None):
            nodes.append(replace(node, rank=len(nodes), processes=kept))
    alive = Process(name="alive", role="train", kind="task", runtime="base", argv=SLEEP)
    nodes[0] = replace(nodes[0], processes=(*nodes[0].processes, alive))
    made = replace(plan, nodes=tuple(nodes))
    (run_dir / "plan.json").write_text(made.to_json().replace(plan.run_dir, str(run_dir)))
    return run_dir


def only(wanted: Callable[[Process], bool]) -> Callable[[Process], Process | None]:
    """Keeps what is wanted, and in the place of the rollout server, whose ports others know, a program that sleeps."""

    def keep(process: Process) -> Process | None:
        if process.name == "rollout-server":
            return replace(process, argv=SLEEP, ready=None, ready_within_s=0.0, alive_within_s=0.0)
        return process if wanted(process) else None

    return keep


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="startup-") as temporary:
        folder = Path(temporary)
        plan = submitted(folder)
        ranks = [each.name for node in plan.nodes for each in node.processes if each.role == "train"]
        whole_dir = cut(plan, folder, "whole", lambda process: process)
        whole = measure(whole_dir, first_rollout)
        print(f"the whole job: {whole}", flush=True)
        parts = {
            "vLLM": measure(cut(plan, folder, "vllm", only(lambda each: each.name == "vllm-0")), all_ready("vllm-0")),
            "NeMo Gym": measure(cut(plan, folder, "gym", only(lambda each: each.name == "gym")), all_ready("gym")),
            f"trainers ({len(ranks)} ranks)": measure(
                cut(plan, folder, "train", only(lambda each: each.role == "train")), all_waiting(*ranks)
            ),
        }
        shutil.rmtree(folder / "whole", ignore_errors=True)
    cores = len(os.sched_getaffinity(0))
    slowest = max(parts, key=lambda name: parts[name].seconds)
    bound = max(parts[slowest].seconds, whole.cpu_seconds / cores)
    measured = {f"{name} alone, ready": part for name, part in parts.items()} | {"the whole job, first rollout": whole}
    rows = [
        f"| {name} | {start.seconds:.1f} s | {start.cpu_seconds:.1f} s | {start.others_cpu_seconds:.1f} s |"
        for name, start in measured.items()
    ]
    record(
        "Start-up",
        "\n".join(
            [
                "| | wall | CPU | CPU of other programs meanwhile |",
                "|---|---|---|---|",
                *rows,
                "",
                f"Whole / max(slowest alone {parts[slowest].seconds:.1f} s, CPU / {cores} cores"
                f" {whole.cpu_seconds / cores:.1f} s): {whole.seconds / bound:.2f} (wanted: {WITHIN}).",
                f"One after the other: {sum(part.seconds for part in parts.values()):.1f} s.",
            ]
        ),
    )


if __name__ == "__main__":
    main()
