"""Every name in Redis but the lanes, which `Lane` knows."""

from __future__ import annotations

from typing import Final

RESULT_STREAM: Final = "shiwu:results"
CLAIMS: Final = "shiwu:claims"
"""Hash: job id → `token|attempt|lane key|message bytes` of every claimed job."""
LEASES: Final = "shiwu:leases"
"""Sorted set: job id → server time in ms at which its lease ends."""
ATTEMPTS: Final = "shiwu:attempts"
"""Hash: job id → `attempts:deaths` so far, for jobs that came back; deaths are workers that ended with the job."""
LAST_CLAIM: Final = "shiwu:last-claim:"
"""Prefix of a string for each worker's token: the ids of its last claim, for the case that the reply was lost."""
DELAYED: Final = "shiwu:delayed"
"""Sorted set: job id → server time in ms at which the job returns to its lane."""
PARKED: Final = "shiwu:parked"
"""Hash: job id → `lane key|message bytes` of every delayed job."""
SUSPECTS: Final = "shiwu:suspects"
"""List of `lane key|message bytes`: jobs whose workers died twice. Who takes one takes nothing else."""
SUSPECTS_TAKER: Final = "shiwu:suspects:taker"
"""The token of the worker that takes the suspects; ends with its lease."""
DEADLINES: Final = "shiwu:deadlines"
"""Sorted set: job id → server time in ms by which its waiter must have an answer (`answer_by_s`)."""
DEAD: Final = "shiwu:dead"
"""Sorted set: job id → server time in ms at which it ended without tags."""
DEAD_ANSWERS: Final = "shiwu:dead:answers"
"""Hash: job id → the answer of a dead letter: status, error, stage, attempts, worker, times."""
DEAD_MESSAGES: Final = "shiwu:dead:messages"
"""Hash: job id → `lane key|message bytes` of a dead letter."""
CANVAS: Final = "shiwu:canvas"
"""Hash: job id → `length of the answer|answer, message bytes` of answered jobs whose callbacks are not sent yet."""
CANVAS_DUE: Final = "shiwu:canvas:due"
"""Sorted set: job id → server time in ms from which any worker may send its callbacks."""
ASIDE: Final = "shiwu:aside:"
"""Prefix of a string for each id that was answered while its message lay in a lane: the answer, for its callbacks."""
HISTORY: Final = "shiwu:history:"
"""Prefix of a string for each job that came back: a line `attempt|code|stage|ended in ms|pause in ms|token` for each
earlier try, the oldest first."""
REVOKED: Final = "shiwu:revoked"
"""Sorted set: id that Celery's revoke named → server time in ms until which that is remembered."""
ENDED: Final = "shiwu:ended"
"""Channel: ids of jobs that were answered while a worker may hold them (cancelled, out of time)."""
LIMITS: Final = "shiwu:limits"
"""Hash: how much is kept and for how long, as the workers' operator says; see `shiwu.keep`."""
COUNTERS: Final = "shiwu:counters"
"""Hash: totals over all workers (answered, answers_discarded, copies_dropped, reaped, results_dropped, …)."""
LOOK: Final = "shiwu:look"
"""String of a few seconds: how much waits and is claimed, counted by one worker for all."""
RESULT_PREFIX: Final = "celery-task-meta-"
WORKERS: Final = "shiwu:workers"
"""Sorted set: worker name → server time in ms of its last sign of life."""


def result_key(job_id: str) -> str:
    """Where Celery looks for the result of a task, and the channel on which it is announced."""
    return f"{RESULT_PREFIX}{job_id}"


def done_key(job_id: str) -> str:
    """The mark of an answered id; it outlives the answer."""
    return f"shiwu:done:{job_id}"
