"""`python -m hpc_gym.node.slurm_nodes RUN_DIR srun ...`: the end of the batch script. Runs the srun, and ends the Slurm
job as the attempt ended.

srun alone would not do: it waits for the tasks of a node that has died until Slurm itself gives the node up
(SlurmdTimeout, five minutes by default). So the coordinator's outcome counts, and srun gets a few seconds after it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

from hpc_gym.node import attempt as attempts
from hpc_gym.node import lost_nodes, scontrol, shared_memory, tree
from hpc_gym.node.causes import cause_from_log
from hpc_gym.node.channel import Message, Refused, connect
from hpc_gym.node.context import NodeContext
from hpc_gym.node.guardian import JOB_SCRIPT_PID, clean
from hpc_gym.node.srun import NotStarted, Srun, TaskEnd
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import Failure, Outcome
from hpc_gym.protocol.files import json_rows

_SRUN_MAY_TAKE_S = 3.0
"""From the outcome to the end of srun, when all nodes live."""
_OUTCOME_MAY_TAKE_S = 5.0
"""From the end of srun until its outcome is seen: another process wrote it, perhaps through a file server."""
_GUARDIAN_MAY_TAKE_S = 1.5
"""From the end of a task until the coordinator knows of it by itself."""
_OUTSIDE = "from outside, or by the kernel for lack of memory"
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
"""Ends of an srun that are not Slurm's, which sends it SIGTERM."""
_REQUEUES_IN_VAIN = 2
"""Requeues that may follow one another without a training step between them: bad nodes, too short a time limit."""
_OTHERS_DECIDED = (scontrol.PREEMPTED, scontrol.QUEUED_AGAIN)
"""Reasons of a requeue that say nothing against the job."""
_NO_STEP = "Unable to create step"
_OWN_END = {
    "TIMEOUT": "the time limit was reached",
    "NODE_FAIL": "Slurm saw a node fail",
    "PREEMPTED": scontrol.PREEMPTED,
}
"""What Slurm ends a job for by itself, without asking."""


class SlurmNodes:
    """One attempt under Slurm. Made in the main thread: it takes the signals that Slurm sends to the batch script."""

    def __init__(self, run_dir: Path, command: Sequence[str]) -> None:
        self._plan = Plan.read(run_dir)
        self._command = command
        self._job_id = os.environ["HPC_GYM_JOB_ID"]
        self._context = NodeContext.from_environment(run_dir, {**os.environ, "HPC_GYM_NODE_RANK": "0"})
        self._parts = lost_nodes.components(os.environ)
        self._began, self._shared_memory = time.time(), shared_memory.names()
        # What the job script heard before there was anybody to tell.
        self._to_forward = [name] if (name := os.environ.pop("HPC_GYM_NOTICE", "")) else []
        for signum in (signal.SIGUSR2, signal.SIGINT):
            signal.signal(signum, self._note)
        # The supervisors got it as well, and decide; this process must live to say how it ended, and to requeue.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def run(self) -> Outcome:
        """Runs srun and returns the outcome of the attempt."""
        if scontrol.has_outlived_its_leader(self._job_id):
            return self._wrote(Outcome("requeue", "Slurm requeued the first component without the others"))
        if 0 < (given := sum(len(part.hosts) for part in self._parts)) < len(self._plan.nodes):
            return self._wrote(Outcome("requeue", f"Slurm gave the job {given} of its {len(self._plan.nodes)} nodes"))
        os.environ[JOB_SCRIPT_PID] = str(os.getpid())
        srun, known_since = Srun(self._command), 0.0
        told: set[TaskEnd] = set()
        while (code := srun.code()) is None:
            if self._to_forward and self._tell({"type": "signal", "signal": self._to_forward[0]}) == "told":
                self._to_forward.pop(0)
            if not known_since and Outcome.read(self._context.attempt_dir) is not None:
                known_since = time.monotonic()
            if known_since and time.monotonic() - known_since > _SRUN_MAY_TAKE_S:
                srun.kill()
            if not known_since and (ended := self._lost_task(srun, told)) is not None:
                failure = self._of_task(ended, srun.said.get(ended.host, ""))
                answer = self._tell({"type": "task_ended", "failure": dataclasses.asdict(failure)})
                if answer == "told":
                    told.add(ended)
                if answer == "refused" and time.monotonic() - ended.seen > _OUTCOME_MAY_TAKE_S:
                    # The task of the coordinator itself.
                    srun.kill()
                    return self._wrote(Outcome("failed", failure=failure))
            time.sleep(0.1)
        if srun.not_started is not None:
            # Whatever the coordinator says: it only saw the other tasks being killed for that.
            return self._wrote(self._of_not_started(srun.not_started))
        if -code in _FROM_OUTSIDE and Outcome.read(self._context.attempt_dir) is None:
            return self._srun_killed(code)
        return self._outcome(code, srun.last_words())

    def sweep(self) -> None:
        """Removes what is left of the first node, which is on this machine, where its guardian was killed as well."""
        if self._context.private_dir.exists():
            tree.kill_all(self._context.marker)
            clean(self._context, self._shared_memory, self._began)

    def end(self, outcome: Outcome) -> int:
        """Does to the Slurm job what the outcome asks for; the exit code where there is still a job to exit from."""
        outcome = self._blaming_the_right(outcome)
        self._parts = lost_nodes.let_go(self._parts, outcome.exclude)
        if outcome.kind == "requeue" and (in_vain := self._in_vain()) > _REQUEUES_IN_VAIN:
            cause = f"{in_vain} attempts in a row ended before their first training step: {outcome.reason}"
            outcome = self._wrote(Outcome("failed", failure=outcome.failure or self._failure(cause)))
        if outcome.kind == "requeue" and self._plan.launch.chain and not self._waiting():
            # Slurm calls the last job of a chain failed, whatever it is to go on with.
            cause = f"no job of the chain (cluster.chain) is left to go on, and {outcome.reason}: hpc-gym resume does"
            outcome = self._wrote(
                Outcome("failed", failure=dataclasses.replace(self._failure(cause), process="job script"))
            )
        if outcome.kind != "requeue":
            attempts.end(Path(self._plan.run_dir))
            self._end_chain()
            if outcome.kind == "cancelled" and scontrol.standing(self._job_id).state == "RUNNING":
                scontrol.cancel_own(self._job_id)
        print(outcome.sentence(), flush=True)
        if outcome.kind == "requeue":
            if self._plan.launch.chain:
                self._hand_on()
            elif refusal := scontrol.requeue(self._job_id):
                print(f"Slurm does not requeue job {self._job_id}: {refusal}", flush=True)
                print(f"`hpc-gym resume {self._plan.name}` goes on from the last checkpoint", flush=True)
            else:
                lost_nodes.restore(self._parts, self._sizes())
                scontrol.leave_out(self._job_id, self._excluded(), self._sizes())
        return outcome.exit_code

    def _sizes(self) -> list[int]:
        """Numbers of nodes of the job's components."""
        sizes = Counter(node.component for node in self._plan.nodes)
        return [sizes[index] for index in sorted(sizes)]

    def _blaming_the_right(self, outcome: Outcome) -> Outcome:
        """A node that reaches neither any of the others nor Slurm is itself the one that is cut off."""
        own, *others = self._context.hosts or [""]
        if len(others) > 1 and set(others) <= set(outcome.exclude) and not scontrol.standing(self._job_id, 1.0).state:
            return self._wrote(dataclasses.replace(outcome, exclude=(own,)))
        return outcome

    def _hand_on(self) -> None:
        """Prepares the next job of the chain, which starts when this one has ended."""
        waiting = self._waiting()
        for job_id in waiting:
            scontrol.leave_out(job_id, self._excluded(), self._sizes())
        print(f"job {waiting[0]}, the next one of the chain, goes on from the last checkpoint", flush=True)

    def _end_chain(self) -> None:
        """Cancels the jobs that wait to go on: there is nothing left to do."""
        if waiting := self._waiting():
            scontrol.cancel(waiting)

    def _waiting(self) -> list[str]:
        """The jobs of the chain after this one, in order."""
        if not self._plan.launch.chain:
            return []
        record = json.loads((Path(self._plan.run_dir) / "job.json").read_text())
        jobs = [record["job_id"], *record["chain"]]
        return jobs[jobs.index(self._job_id) + 1 :] if self._job_id in jobs else []

    def _note(self, number: int, _: FrameType | None) -> None:
        self._to_forward.append(signal.Signals(number).name)

    def _tell(self, message: Message) -> Literal["told", "refused", "silent"]:
        """Sends the coordinator a message; `refused` where nobody listens."""

        async def tell() -> None:
            host, port = self._context.coordinator
            channel = await connect(host, port, self._context.secrets.token, {"guardian": True})
            channel.send(message)
            await channel.close()

        try:
            asyncio.run(tell())
        except ConnectionRefusedError:
            return "refused"
        except (OSError, TimeoutError, Refused):
            return "silent"
        return "told"

    def _lost_task(self, srun: Srun, told: Collection[TaskEnd]) -> TaskEnd | None:
        """The first task whose end may be news to the coordinator: a supervisor that ends knows an outcome, and one
        that dies is told of by its guardian.
        """
        before = time.monotonic() - _GUARDIAN_MAY_TAKE_S
        return next((each for each in srun.ends if each.seen < before and each not in told), None)

    def _of_not_started(self, found: NotStarted) -> Outcome:
        rank = self._rank(found.host)
        cause = f"host {found.host}: Slurm did not start its task: {found.why}"
        return Outcome("requeue", "a node was lost", (found.host,), self._failure(cause, rank=rank))

    def _rank(self, host: str, otherwise: int = 0) -> int:
        hosts = self._context.hosts
        return hosts.index(host) if host in hosts else min(otherwise, len(self._plan.nodes) - 1)

    def _of_task(self, ended: TaskEnd, said: str) -> Failure:
        rank = self._rank(ended.host, otherwise=ended.task)
        log = self._submitit(f"{rank}_log.err")
        cause = _OUTSIDE if ended.signal == "SIGKILL" else said or cause_from_log(log)
        failure = self._failure(cause, log if log.exists() else None, rank, ended.exit_code)
        return dataclasses.replace(failure, signal=ended.signal)

    def _srun_killed(self, code: int) -> Outcome:
        """Writes the outcome first, as Slurm kills the tasks of such an srun: the coordinator would blame one of them.
        Returns when it has ended, with what it had started.
        """
        name = signal.Signals(-code).name
        failure = dataclasses.replace(self._failure(_OUTSIDE), process="srun", signal=name)
        outcome = self._wrote(Outcome("failed", failure=failure))
        supervision = self._plan.supervision
        deadline = time.monotonic() + supervision.stop_within_s + supervision.checkpoint_grace_s
        while self._tell({"type": "task_ended", "failure": dataclasses.asdict(failure)}) != "refused":
            if time.monotonic() > deadline:
                break
            time.sleep(0.3)
        return outcome

    def _outcome(self, srun_code: int, words: str) -> Outcome:
        deadline = time.monotonic() + _OUTCOME_MAY_TAKE_S
        while (outcome := Outcome.read(self._context.attempt_dir)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if outcome is not None and outcome.kind != "cancelled":
            return outcome
        # SIGTERM is all that a job hears when Slurm itself ends it: what for, Slurm knows.
        standing = scontrol.standing(self._job_id)
        state = "PREEMPTED" if standing.preempted and standing.state != "PENDING" else standing.state
        goes_on = ("PENDING", "NODE_FAIL", "PREEMPTED", "REQUEUED", *(("TIMEOUT",) if self._plan.launch.chain else ()))
        if state in goes_on:
            corrected = Outcome("requeue", _OWN_END.get(state, scontrol.QUEUED_AGAIN))
        elif state == "TIMEOUT":
            corrected = Outcome("failed", failure=self._failure(_OWN_END[state]))
        elif state == "CANCELLED":
            corrected = Outcome("cancelled", "the job was cancelled in Slurm")
        elif outcome is not None:
            return outcome
        else:
            corrected = self._of_srun(self._without_outcome(srun_code, words))
        return self._wrote(corrected)

    def _of_srun(self, failure: Failure) -> Outcome:
        """An srun that could start the attempts before is not at fault when Slurm makes no step of it: 22.05 has
        forgotten its GPUs where it was requeued with a silent node in it that could not be given back (`lost_nodes`).
        """
        if self._context.attempt > 1 and _NO_STEP in failure.cause:
            return Outcome("requeue", "Slurm did not start the attempt", failure=failure)
        return Outcome("failed", failure=failure)

    def _wrote(self, outcome: Outcome) -> Outcome:
        try:
            outcome.write(self._plan.run_dir, self._context.attempt_dir)
        except OSError as error:
            print(f"the outcome could not be written to {self._context.attempt_dir}: {error.strerror}", flush=True)
        return outcome

    def _failure(self, cause: str, log: Path | None = None, rank: int = 0, code: int | None = None) -> Failure:
        log = log or self._submitit("batch.out")
        node = self._plan.nodes[rank]
        return Failure(node.role, node.name, "supervisor", cause, str(log), self._context.attempt, time.time(), code)

    def _without_outcome(self, code: int, words: str) -> Failure:
        """What is said when no coordinator lived to say it: the first task's error, else srun's."""
        for node in self._plan.nodes:
            log = self._submitit(f"{node.rank}_log.err")
            if cause := cause_from_log(log):
                return self._failure(cause, log, node.rank)
        failure = self._failure(f"there is no outcome of the attempt; its last words: {words or 'none'}", code=code)
        return dataclasses.replace(failure, process="srun")

    def _submitit(self, name: str) -> Path:
        return Path(self._plan.run_dir) / "submitit" / f"{self._job_id}_{name}"

    def _in_vain(self) -> int:
        """How many attempts, up to this one, were requeued one after the other without having made a training step."""
        trained = self._attempts_with_a_step()
        number = self._context.attempt
        while number > 0 and number not in trained:
            outcome = Outcome.read(self._context.attempt_dir.with_name(str(number)))
            if outcome is None or outcome.kind != "requeue" or outcome.reason in _OTHERS_DECIDED:
                break
            number -= 1
        return self._context.attempt - number

    def _attempts_with_a_step(self) -> set[int]:
        try:
            rows = json_rows((Path(self._plan.run_dir) / "metrics.jsonl").read_bytes())
        except FileNotFoundError:
            return set()
        return {int(row["attempt"]) for row in rows if "attempt" in row}

    def _excluded(self) -> list[str]:
        """Hosts that the next attempt is to do without: the bad ones of the job's attempts."""
        folder = self._context.attempt_dir.parent
        hosts: list[str] = []
        for number in range(self._context.attempt, 0, -1):
            outcome = Outcome.read(folder / str(number))
            if outcome is not None and outcome.kind != "requeue":
                break  # the end of a job that this one resumes: its bad nodes may be well again
            hosts = [*(host for host in (outcome.exclude if outcome else ()) if host), *hosts]
        return list(dict.fromkeys(hosts))


def main() -> int:
    """Returns the exit code of the batch script, which is the job's."""
    nodes = SlurmNodes(Path(sys.argv[1]), sys.argv[2:])
    outcome = nodes.run()
    nodes.sweep()
    return nodes.end(outcome)


if __name__ == "__main__":
    sys.exit(main())
