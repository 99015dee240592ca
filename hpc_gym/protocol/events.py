"""The event log of an attempt, `attempts/K/events.jsonl`: one JSON object a line, written by the coordinator alone,
but for the first event, which the job script writes before there is one.

Every event has `time` (seconds since the epoch, clock of the node it happened on), `attempt`, `node`, `role`, `process`
("" for the node itself) and `event`, which is one of:

=================  ==================================================================================================
job: `began`       its nodes are allocated, the job script runs; `host`, `job_id`
node: `joined`     its supervisor reported to the coordinator; `host`, `address`, `pid`
node: `checked`    it is fit for the job; `seconds` that took. Not in local jobs
node: `unfit`      it is not: `cause`
node: `silent`     no heartbeat for `seconds`
node: `released`   nothing of the attempt is left on it; `seconds` since it was told to stop
`started`          `pid`, `restarts` so far
`progress`         on the way to ready: `text` ("3 / 9 servers")
`status`           `text`, what the process says it does
`ready`            `seconds` since it was started, `cpu_seconds` it has used
`saving`, `saved`  a checkpoint is being written; no longer
`complained`       it says that it fails: `cause`
`hung`             it will be killed: `cause`
`exited`           `exit_code` or `signal`, `seconds` since it was started, `cpu_seconds` with its waited-for children
`restarting`       in place, after `delay` seconds; `restarts`, `cause`
`failed`           the fields of `hpc_gym.protocol.attempt.Failure`
job: `stopping`    `reason`; node and role are those of the coordinator
job: `outcome`     `kind`, `sentence`, `seconds` since the first cause
=================  ==================================================================================================
"""

from __future__ import annotations

from typing import Any, TypeAlias

Event: TypeAlias = dict[str, Any]
