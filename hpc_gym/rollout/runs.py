"""Rollouts: a dataset row goes to its environment's agent, and comes back as a trajectory with a reward or a reason."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hpc_gym.plan.plan import Environment
from hpc_gym.protocol.messages import RolloutRequest, Sampling
from hpc_gym.protocol.trajectory import REPLICA_GONE, Outcome, Trajectory
from hpc_gym.rollout.conversation import Conversation
from hpc_gym.rollout.gym import Gym
from hpc_gym.rollout.outcomes import Failed, read_verdict, worth_retrying
from hpc_gym.rollout.policy import TAG, PolicyEndpoint
from hpc_gym.rollout.replicas import Replica, Replicas

log = logging.getLogger(__name__)

WAIT_S = 0.2
"""How often a rollout looks whether what it waits for is there."""
RETRY_S = 0.5


class BadRow(ValueError):
    """The row cannot be rolled out, whatever happens."""


class Row:
    """A dataset row as `/run` takes it, up to the tag, with the sampling settings put in."""

    def __init__(self, data: bytes, sampling: Sampling) -> None:
        """Raises BadRow when `data` is no row of NeMo Gym."""
        try:
            self._fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            self._params = msgspec.json.decode(self._fields["responses_create_params"], type=dict[str, Any])
            metadata = self._params.get("metadata") or {}
            extra = msgspec.json.decode(metadata.get("extra_body") or "{}", type=dict[str, Any])
        except KeyError as error:
            raise BadRow("the row has no 'responses_create_params'") from error
        except (msgspec.MsgspecError, TypeError, AttributeError) as error:
            raise BadRow(f"the row is no row of NeMo Gym: {error}") from error
        self._metadata, self._extra = metadata, extra
        wanted = msgspec.structs.asdict(sampling)
        self._params |= {name: value for name, value in wanted.items() if value is not None}

    def body(self, tag: str) -> bytes:
        """The JSON for `/run`, with the tag where NeMo Gym's vLLM adapter merges it into each chat request."""
        extra = msgspec.json.encode(self._extra | {TAG: tag}).decode()
        params = self._params | {"metadata": self._metadata | {"extra_body": extra}}
        return msgspec.json.encode(self._fields | {"responses_create_params": params})


class Rollouts:
    """Runs rollouts, at most `max_concurrent` at a time; the rest wait in order of arrival."""

    def __init__(
        self,
        environments: Sequence[Environment],
        replicas: Replicas,
        gym: Gym,
        policy: PolicyEndpoint,
        max_concurrent: int,
        trouble: Callable[[], str] = str,
    ) -> None:
        """`trouble`: what keeps environments from an answer though they cannot say it, the judge's; empty: nothing."""
        self._trouble = trouble
        self._environments = {environment.name: environment for environment in environments}
        self._replicas = replicas
        self._gym = gym
        self._policy = policy
        self._room = asyncio.Semaphore(max_concurrent)
        self.running = 0
        self.queued = 0

    def environment(self, name: str) -> Environment:
        """Raises BadRow for an environment that the Plan does not have."""
        try:
            return self._environments[name]
        except KeyError:
            known = ", ".join(sorted(self._environments))
            raise BadRow(f"there is no environment '{name}' in this run; there are: {known}") from None

    async def one(self, request: RolloutRequest, row: Row, index: int, weight_version: int) -> Trajectory:
        """The trajectory of one request, tried as often as its environment allows. Never raises for a failed
        rollout.
        """
        environment = self.environment(request.environment)
        self.queued += 1
        try:
            await self._room.acquire()
        finally:
            self.queued -= 1
        self.running += 1
        try:
            return await self._tried(environment, request.group, row, index, weight_version)
        finally:
            self.running -= 1
            self._room.release()

    async def _tried(
        self, environment: Environment, group: int, row: Row, index: int, weight_version: int
    ) -> Trajectory:
        loop = asyncio.get_running_loop()
        start = loop.time()
        deadline = start + environment.timeout_s
        first, failed_at = "", -math.inf
        for attempt in itertools.count(1):
            try:
                conversation = await self._open(group, weight_version, deadline, failed_at)
                try:
                    reward, metrics = await self._attempt(environment, conversation, row)
                finally:
                    self._policy.close(conversation)
            except Failed as failed:
                failed = failed.explained(self._trouble())
                log.warning("%s: attempt %d/%d failed: %s", environment.name, attempt, environment.max_attempts, failed)
                first = first or failed.reason
                over = loop.time() + RETRY_S >= deadline or attempt >= environment.max_attempts
                if over or not worth_retrying(failed.reason):
                    reason = both_reasons(first, failed.reason, attempt)
                    seconds = loop.time() - start
                    return Trajectory(index, Outcome.FAILED, reason, attempts=attempt, seconds=seconds)
                failed_at = loop.time()
                await asyncio.sleep(RETRY_S)
            else:
                return conversation.trajectory(
                    index,
                    Outcome.TRUNCATED if conversation.truncated else Outcome.OK,
                    reason=conversation.truncated,
                    reward=reward,
                    metrics=metrics,
                    attempts=attempt,
                    seconds=loop.time() - start,
                )
        raise AssertionError("unreachable")

    async def _open(self, group: int, weight_version: int, deadline: float, failed_at: float) -> Conversation:
        """A conversation, once there is a replica for it and NeMo Gym is there, as it was seen to be since an attempt
        before failed: a server that has just died must not fail this one too. Raises Failed when that takes too long.
        """
        loop = asyncio.get_running_loop()
        while True:
            replica: Replica | None = self._replicas.choose(group, weight_version)
            if replica is not None and self._gym.usable(failed_at):
                wanted = max(weight_version, self._replicas.newest)
                return self._policy.open(replica, wanted, deadline)
            if reason := self._replicas.hopeless(weight_version):
                raise Failed(reason)
            if loop.time() >= deadline:
                if replica is None:
                    raise Failed("replica_lost: no vLLM replica was ready before the rollout's deadline")
                missing = self._gym.missing()
                raise Failed(f"environment_server_lost: {missing} was not there before the rollout's deadline")
            await asyncio.sleep(WAIT_S)

    async def _attempt(
        self, environment: Environment, conversation: Conversation, row: Row
    ) -> tuple[float, dict[str, float]]:
        """One `/run`: reward and metrics. Raises Failed."""
        run = asyncio.ensure_future(self._gym.run(environment.agent, row.body(conversation.tag)))
        ended = asyncio.ensure_future(conversation.ended.wait())
        try:
            left = conversation.deadline - asyncio.get_running_loop().time()
            await asyncio.wait({run, ended}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if conversation.failure:
                raise Failed(conversation.failure)
            if not run.done():
                raise Failed(f"deadline: the rollout was not done within {environment.timeout_s:g} s")
            reward, metrics = read_verdict(run.result())
        finally:
            for task in (run, ended):
                task.cancel()
            await asyncio.gather(run, ended, return_exceptions=True)
        if conversation.turns == 0:
            raise Failed(f"no_policy_tokens: {conversation.truncated or 'the environment never asked the policy'}")
        return reward, metrics


def both_reasons(first: str, last: str, attempt: int) -> str:
    """The reason of a rollout whose attempts failed: that of the first, but whoever asked for it reads from the
    beginning whether its replica is gone.
    """
    if last == first:
        return first
    return f"{last} (attempt 1: {first})" if last.startswith(REPLICA_GONE) else f"{first} (attempt {attempt}: {last})"
