from __future__ import annotations

from dataclasses import replace

import pytest

from hpc_gym.node.verdict import Verdict
from hpc_gym.protocol.attempt import Failure, Outcome

TASKS = frozenset({(1, "rank-0"), (2, "rank-1")})


def failure(process: str, cause: str = "boom", signal: str | None = None) -> Failure:
    return Failure("train", "train-0", process, cause, "/log", 1, 0.0, None if signal else 1, signal)


def kind(verdict: Verdict) -> str:
    outcome = verdict.outcome()
    return outcome.kind if outcome else "running"


def test_the_job_is_done_when_every_task_ended_well() -> None:
    verdict = Verdict(TASKS)
    verdict.ended[1, "rank-0"] = 0
    assert kind(verdict) == "running"
    verdict.ended[2, "rank-1"] = 0
    assert kind(verdict) == "completed"


def test_tasks_that_stopped_at_a_checkpoint_ask_for_a_requeue() -> None:
    verdict = Verdict(TASKS, checkpoint="time limit")
    assert kind(verdict) == "running"
    verdict.ended.update({(1, "rank-0"): 85, (2, "rank-1"): 85})
    assert verdict.outcome() == Outcome("requeue", "time limit")


def test_a_checkpoint_that_fails_or_is_late_still_leads_to_a_requeue() -> None:
    assert kind(Verdict(TASKS, checkpoint="time limit", overdue=True)) == "requeue"
    assert kind(Verdict(TASKS, checkpoint="time limit", failures=[failure("rank-0")])) == "requeue"


def test_a_signal_to_the_job_explains_what_dies_with_it() -> None:
    verdict = Verdict(TASKS, failures=[failure("rank-0", signal="SIGTERM")], cancelled="the job received SIGTERM")
    assert kind(verdict) == "cancelled"


def test_the_first_failure_that_is_not_the_loss_of_a_peer_is_the_cause() -> None:
    verdict = Verdict(TASKS)
    verdict.failures.append(failure("rank-1", "RuntimeError: Connection closed by peer [127.0.0.1]:4"))
    assert verdict.only_collateral()
    verdict.failures += [failure("rank-0", "ValueError: x"), failure("vllm-0", "OSError: y")]
    outcome = verdict.outcome()
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.process == "rank-0"


def test_a_task_that_said_why_it_fails_is_the_cause_though_its_peers_are_faster_to_end() -> None:
    verdict = Verdict(TASKS, complaints=[failure("rank-0", "ValueError: x")])
    assert kind(verdict) == "running"
    verdict.failures.append(failure("rank-1", "RuntimeError: Connection closed by peer [127.0.0.1]:4"))
    outcome = verdict.outcome()
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.process == "rank-0"


def test_who_was_killed_did_not_die_of_another_whatever_its_last_words_were() -> None:
    verdict = Verdict(TASKS, failures=[failure("rank-1", "RuntimeError: Connection closed by peer")])
    verdict.failures.append(failure("rank-0", "from outside; last words: Connection reset by peer", signal="SIGKILL"))
    outcome = verdict.outcome()
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.process == "rank-0"
    aborted = failure("rank-1", "terminate called after an instance of 'gloo::IoException': Connection closed by peer")
    assert Verdict(TASKS, failures=[replace(aborted, signal="SIGABRT", exit_code=None)]).only_collateral()


@pytest.mark.parametrize("cause", ["Connection reset by peer", "an error that nobody has seen before"])
def test_a_lost_node_explains_failures_of_its_peers_and_is_excluded(cause: str) -> None:
    verdict = Verdict(TASKS, failures=[failure("rank-1", cause)])
    verdict.lost.append((failure("supervisor", "no heartbeat"), "node3"))
    outcome = verdict.outcome()
    assert outcome is not None
    assert (outcome.kind, outcome.exclude) == ("requeue", ("node3",))
    assert outcome.sentence().endswith("(log: /log); without node3")


def test_a_lost_node_whose_name_nobody_knows_is_not_excluded() -> None:
    verdict = Verdict(TASKS, lost=[(failure("supervisor", "did not report"), "")])
    outcome = verdict.outcome()
    assert outcome is not None
    assert "without" not in outcome.sentence()


def test_without_its_script_a_job_cannot_be_requeued_and_fails() -> None:
    killed = failure("job script", "from outside", "SIGKILL")
    verdict = Verdict(TASKS, checkpoint="time limit", overdue=True, script_killed=killed)
    assert verdict.outcome() == Outcome("failed", failure=killed)


def test_an_outcome_reads_back_as_it_was_written() -> None:
    outcome = Outcome("requeue", "a node was lost", ("node3",), failure("supervisor", signal="SIGKILL"))
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_service_that_dies_does_not_keep_tasks_from_their_checkpoint() -> None:
    assert kind(Verdict(TASKS, checkpoint="preempted", failures=[failure("vllm-0")])) == "running"
    assert kind(Verdict(TASKS, checkpoint="preempted", failures=[failure("supervisor")])) == "requeue"
