"""All key and channel names in Redis, except for the lanes (see `Lane`)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

RESULT_STREAM: Final = "shiwu:results"
CLAIMS: Final = "shiwu:claims"
"""Hash: job id → `token|attempt|lane key|message bytes` of every claimed job."""
LEASES: Final = "shiwu:leases"
"""Sorted set: job id → server time in ms at which its lease expires."""
ATTEMPTS: Final = "shiwu:attempts"
"""Hash: job id → `attempts:worker deaths` so far, for jobs that returned to their lane, or `attempts/generation:worker
deaths` for requeued dead letters. Both forms are read by versions that know no generations."""
LAST_CLAIM: Final = "shiwu:last-claim:"
"""Prefix of a string for each worker's token: `number|ids` of its last claim, in case the reply was lost."""
DELAYED: Final = "shiwu:delayed"
"""Sorted set: job id → server time in ms at which the job returns to its lane."""
DELAYED_MESSAGES: Final = "shiwu:delayed:messages"
"""Hash: job id → `lane key|message bytes` of every delayed job."""
QUARANTINE: Final = "shiwu:quarantine"
"""List of `lane key|message bytes`: jobs that two worker deaths interrupted. A worker runs them one at a time, and
holds no other job meanwhile."""
QUARANTINE_OWNER: Final = "shiwu:quarantine:owner"
"""String: the token of the worker that owns the quarantine; expires with its lease."""
DEADLINES: Final = "shiwu:deadlines"
"""Sorted set: job id → server time in ms by which its caller must have an answer (`answer_by_s`). It is an index that
producers may write to: only a message whose own deadline has passed is answered."""
SCAN_WANTED: Final = "shiwu:deadlines:wanted"
"""String: server time in ms at which a deadline had passed whose message is neither claimed nor delayed. It may be in a
lane or in quarantine, which one process then looks through."""
SCAN_OWNER: Final = "shiwu:deadlines:scanner"
"""String that expires after a few seconds: the token of the process that looks through them."""
DEAD: Final = "shiwu:dead"
"""Sorted set: job id → server time in ms at which it ended without tags."""
DEAD_ANSWERS: Final = "shiwu:dead:answers"
"""Hash: job id → the answer of a dead letter: status, error, stage, attempts, worker, times."""
DEAD_MESSAGES: Final = "shiwu:dead:messages"
"""Hash: job id → `lane key|message bytes` of a dead letter."""
CANVAS: Final = "shiwu:callbacks"
"""Hash: job id → `length of the answer|answer, message bytes` of answered jobs whose callbacks are not sent yet. After
a requeue the id is followed by a byte 255, which no id contains, and the generation."""
CANVAS_DUE: Final = "shiwu:callbacks:due"
"""Sorted set: job id → server time in ms from which any worker may send its callbacks."""
PENDING_ANSWERS: Final = "shiwu:pending-answers"
"""Hash: job id → its answer, for its callbacks, of jobs that were answered while their message was in a lane."""
PENDING_ANSWERS_EXPIRY: Final = "shiwu:pending-answers:expiry"
"""Sorted set: job id → server time in ms at which maintenance drops this answer."""
HISTORIES: Final = "shiwu:histories"
"""Hash: job id → earlier attempts of a job that returned to its lane, until it is answered. Each has a line
`attempt|code|stage|ended in ms|pause in ms|token`, oldest first."""
HISTORIES_EXPIRY: Final = "shiwu:histories:expiry"
"""Sorted set: job id → server time in ms at which maintenance drops this history."""
CALL_REPLY: Final = "shiwu:reply:"
"""Prefix of a string for each call that a client may repeat by itself: the reply of the call, for a minute."""
REVOKED: Final = "shiwu:revoked"
"""Sorted set: id that Celery's revoke named → server time in ms until which it is remembered."""
ANSWERED_CHANNEL: Final = "shiwu:answered"
"""Channel: ids of jobs that were answered while a worker may hold them (cancelled, out of time)."""
RETENTION: Final = "shiwu:retention"
"""Hash: how much is kept and for how long, as the workers are configured; see `shiwu.broker.retention`."""
COUNTERS: Final = "shiwu:counters"
"""Hash: totals over all workers (answered, answers_discarded, duplicates_dropped, reaped, results_dropped, …)."""
LABELS: Final = "shiwu:labels"
"""Hash: digest → the label set with it, as JSON; see `shiwu.broker.known_labels`."""
LABELS_OF_REQUESTS: Final = "shiwu:labels:requests"
"""List: digests of label sets that came with requests, newest first; the oldest are removed."""
QUEUE_SNAPSHOT: Final = "shiwu:queue-snapshot"
"""String that expires after a few seconds: the queue snapshot that one worker counted for all."""
RESULT_PREFIX: Final = "celery-task-meta-"
MARKS: Final = tuple(f"shiwu:marks:{number}" for number in range(4))
"""Hashes: answered id → its mark, `token:attempt[#generation]`, which outlives the answer. New marks go to a hash that
lives long enough for them; it is removed when all of its marks are old."""
BACKFILLS: Final = "shiwu:backfills"
"""Sorted set: name of a backfill → server time in ms of its first start."""
BACKFILL: Final = "shiwu:backfill:"
"""Prefix of a hash for each backfill: plan, cursor, counts, parts; kept for 30 days after its end."""
BACKFILL_OPEN: Final = "shiwu:backfill:open:"
"""Prefix of a hash for each backfill: job id → `portion|JSON` with the image; of jobs whose answers are not written."""
HOOKS_DELIVERIES: Final = "shiwu:hooks:deliveries"
"""Hash: `endpoint|webhook id` → `created in ms|failed tries|takes|payload` of every delivery that is not made yet."""
HOOKS_DUE: Final = "shiwu:hooks:due"
"""Sorted set: endpoint → server time in ms at which to look for deliveries of it that are due."""
HOOKS_PENDING: Final = "shiwu:hooks:due:"
"""Prefix of a sorted set for each endpoint: webhook id → server time in ms at which it is due. A process that takes a
delivery moves its time behind the lease, so that another process takes it if the first one crashes."""
HOOKS_HEALTH: Final = "shiwu:hooks:endpoints"
"""Hash: endpoint → `failures in a row|no try before, in ms|disabled since, in ms|last failure in ms|its reason`."""
HOOKS_DEAD: Final = "shiwu:hooks:dead"
"""Sorted set: `endpoint|webhook id` → server time in ms at which the delivery was given up."""
HOOKS_DEAD_DELIVERIES: Final = "shiwu:hooks:dead:deliveries"
"""Hash: `endpoint|webhook id` → `reason|` and the record of a delivery that was given up."""
WORKERS: Final = "shiwu:workers"
"""Sorted set: worker name → server time in ms of its last heartbeat."""
WORKER_STATE: Final = "shiwu:worker:"
"""Prefix of a string for each worker's name, which expires after ten seconds: rate, load, device and model, as JSON."""
WATCH_UNREAD: Final = "shiwu:watch:unread"
"""List: bucket events that could not be read, as JSON with the reason, newest first; at most a thousand."""
FOREIGN: Final = "shiwu:foreign:"
"""Prefix of values of a wrong type that stood under a key of shiwu: `<key>:<time in ms>`; kept for a week."""
KEY_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        COUNTERS: "hash",
        CLAIMS: "hash",
        LEASES: "zset",
        ATTEMPTS: "hash",
        DELAYED: "zset",
        DELAYED_MESSAGES: "hash",
        QUARANTINE: "list",
        QUARANTINE_OWNER: "string",
        DEADLINES: "zset",
        SCAN_WANTED: "string",
        SCAN_OWNER: "string",
        DEAD: "zset",
        DEAD_ANSWERS: "hash",
        DEAD_MESSAGES: "hash",
        CANVAS: "hash",
        CANVAS_DUE: "zset",
        PENDING_ANSWERS: "hash",
        PENDING_ANSWERS_EXPIRY: "zset",
        HISTORIES: "hash",
        HISTORIES_EXPIRY: "zset",
        **dict.fromkeys(MARKS, "hash"),
        REVOKED: "zset",
        RETENTION: "hash",
        LABELS: "hash",
        LABELS_OF_REQUESTS: "list",
        QUEUE_SNAPSHOT: "string",
        RESULT_STREAM: "stream",
        WORKERS: "zset",
    }
)
"""Key that all processes share → its type, as Redis' TYPE names it. The counters come first. Lanes are lists."""


def result_key(job_id: str) -> str:
    """The key where Celery looks for the result of a task, and the channel on which it is announced."""
    return f"{RESULT_PREFIX}{job_id}"


def done_key(job_id: str) -> str:
    """The key of the mark of an answered id as versions before `MARKS` write and read it."""
    return f"shiwu:done:{job_id}"
