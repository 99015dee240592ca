"""`hpc-gym logs` against `tail`: reading 64 log files to the end, following them as they grow, and the memory for it.

    python benchmarks/logs.py [--mb-per-file 8]
    python benchmarks/logs.py --memory-of 10

Prints one table, side by side from one run, and appends it to benchmarks/RESULTS.md. The second form only asks for the
memory, with so many gigabytes of logs and with a tenth of them, which it writes below the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from results import record

from hpc_gym.protocol.log_lines import log_name, stamp

FILES = 64
START = 1_790_000_000.0
TEXT = b"Avg prompt throughput: 1234.5 tokens/s, Avg generation throughput: 987.6 tokens/s, Running: 12 reqs\n"


def make_run(folder: Path, megabytes: float) -> list[Path]:
    """A run directory with one record and 64 logs whose lines interleave."""
    log_dir = folder / "attempts" / "1" / "logs"
    log_dir.mkdir(parents=True)
    (folder / "attempts" / "latest").symlink_to("1")
    job = {"job_id": "local-0", "kind": "local", "name": folder.name, "run_dir": str(folder), "experiment": "x"}
    host = {"host": os.uname().nodename, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    process = {**host, "pid": os.getpid(), "started": int(Path("/proc/self/stat").read_text().split()[21])}
    job |= {"cluster": "local", "nodes": 8, "submitted": time.time(), "process": process}
    (folder / "job.json").write_text(json.dumps(job))
    paths = []
    count = int(megabytes * 1e6 / (len(TEXT) + 28))
    for number in range(FILES):
        path = log_dir / log_name("train", f"train-{number // 8}", f"rank-{number}")
        with path.open("wb") as file:
            # Never all of it at once: the peak of this process would count as that of those it starts (getrusage(2)).
            file.writelines(stamp(START + line + number / FILES) + TEXT for line in range(count))
        paths.append(path)
    return paths


def timed(command: list[str], sink: int, repeats: int = 3) -> tuple[float, float, float]:
    """(least seconds, least CPU seconds, largest peak in MiB) of a command with its output in `sink`."""
    walls, cpus, peaks = zip(*(once(command, sink) for _ in range(repeats)), strict=True)
    return min(walls), min(cpus), max(peaks)


def once(command: list[str], sink: int) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MiB) of a command with its output in `sink`."""
    begin = time.monotonic()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, sink, 1)])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ... failed")
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def lag(command: list[str], paths: list[Path], writes: int = 100) -> list[float]:
    """Seconds from the writing of a line to its coming out of a following command, over all files."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as follower:
        assert follower.stdout is not None
        came: dict[bytes, float] = {}
        settled = threading.Event()

        def read() -> None:
            for line in follower.stdout or ():
                if b"marker-" in line:
                    came[line.split()[-1]] = time.monotonic()
                    settled.set()

        threading.Thread(target=read, daemon=True).start()
        wrote: dict[bytes, float] = {}

        def write(name: bytes, path: Path) -> None:
            wrote[name] = time.monotonic()
            with path.open("ab") as file:
                file.write(stamp(time.time()) + name + b"\n")

        # Until the first one comes out, the command is still reading what was there.
        for attempt in range(600):
            write(b"marker-first%d" % attempt, paths[0])
            if settled.wait(0.2):
                break
        for number in range(writes):
            write(b"marker-%d" % number, paths[number % FILES])
            time.sleep(0.02)
        time.sleep(1.5)
        follower.terminate()
    names = [b"marker-%d" % number for number in range(writes)]
    return sorted(came.get(name, float("inf")) - wrote[name] for name in names)


TRACEBACK = (b"Traceback (most recent call last):", b'  File "step.py", line 7, in step', b"ValueError: the cause")


def measure_memory(gigabytes: float) -> None:
    """Records the peak memory of reading that much, and a tenth of it. One log of the 64 ends with a traceback."""
    commands = {"hpc-gym logs": [], "hpc-gym logs --errors": ["--errors"]}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    with Path(os.devnull).open("wb") as sink:
        for size in (gigabytes / 10, gigabytes):
            with tempfile.TemporaryDirectory() as parent:
                paths = make_run(Path(parent) / "run", size * 1000 / FILES)
                with paths[17].open("ab") as log:
                    log.writelines(stamp(START + 10**7) + line + b"\n" for line in TRACEBACK)
                for name, options in commands.items():
                    command = [sys.executable, "-m", "hpc_gym.cli.main", "logs", str(Path(parent) / "run"), *options]
                    peaks[name].append(once(command, sink.fileno())[2])
    lines = [f"{FILES} files. Peak memory.", "", f"| | {gigabytes / 10:g} GB | {gigabytes:g} GB |", "|---|---|---|"]
    lines += [f"| `{name}` | {small:.0f} MiB | {large:.0f} MiB |" for name, (small, large) in peaks.items()]
    record("Memory for logs", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb-per-file", type=float, default=4)
    parser.add_argument("--memory-of", type=float, metavar="GB")
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of)
        return
    ours = [sys.executable, "-m", "hpc_gym.cli.main", "logs"]
    with tempfile.TemporaryDirectory() as parent, Path(os.devnull).open("wb") as sink:
        small, large = Path(parent) / "small", Path(parent) / "large"
        few = make_run(small, arguments.mb_per_file / 8)
        paths = make_run(large, arguments.mb_per_file)
        total = sum(path.stat().st_size for path in paths) / 1e6
        names = [str(path) for path in paths]
        rows = []
        for title, command in [
            ("hpc-gym logs (merged by time)", [*ours, str(large)]),
            ("tail -n +1 -q (file after file)", ["/usr/bin/tail", "-q", "-n", "+1", *names]),
            ("sort -m -k1,1 (merged, no prefixes)", ["/usr/bin/sort", "-m", "-k1,1", *names]),
        ]:
            seconds, cpu, memory = timed(command, sink.fileno())
            row = [f"{seconds:.2f} s", f"{total / seconds:.0f} MB/s", f"{cpu:.2f} s", f"{memory:.0f} MiB"]
            rows.append([title, *row])
        _, _, memory_of_eighth = timed([*ours, str(small)], sink.fileno())
        follow_ours = lag([*ours, "--follow", str(small)], few)
        follow_tail = lag(["/usr/bin/tail", "-F", *map(str, few)], few)
    lines = [f"{FILES} files, {total:.0f} MB. Peak memory with an eighth of that: {memory_of_eighth:.0f} MiB.", ""]
    lines += ["| reading all | time | rate | CPU time | peak memory |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| lag of a followed line | median | largest of 100 |", "|---|---|---|"]
    for title, lags in [("hpc-gym logs --follow", follow_ours), ("tail -F", follow_tail)]:
        lines.append(f"| {title} | {lags[len(lags) // 2]:.2f} s | {lags[-1]:.2f} s |")
    record("Logs", "\n".join(lines))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
