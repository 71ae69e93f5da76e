"""Celery's revoke: cancels the jobs that a broadcast names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import redis
import structlog
from structlog.typing import FilteringBoundLogger

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import classify
from shiwu.broker.script_loader import load_script
from shiwu.broker.server_clock import server_time_ms
from shiwu.contract import (
    CLAIMS,
    DELAYED_MESSAGES,
    REVOKED,
    Answer,
    ErrorCode,
    ErrorInfo,
    RequestError,
    Stage,
    Status,
    check_id,
    moment,
)

log: FilteringBoundLogger = structlog.get_logger()
REMEMBERED_S: Final = 10_800.0
"""How long a revoke applies to jobs that are not known yet; the same as in Celery."""
MAX_REMEMBERED: Final = 50_000
"""Largest number of such ids; the same as in Celery."""
MAX_THREADS: Final = 16
"""How many shards are asked at the same time."""
CHUNK_SIZE: Final = 1000
"""Ids in one call of the script."""


class Revoker:
    """Carries out revokes: known jobs are answered immediately, others when they are claimed."""

    def __init__(self, client: redis.Redis, answer_store: AnswerStore) -> None:
        self._client = client
        self._answer_store = answer_store
        self._script = load_script(client, "revoke")

    def revoke(self, ids: Sequence[str]) -> int:
        """Revoke any number of ids, in chunks. Return how many jobs were answered now.

        Raises:
            redis.RedisError: the call may be repeated.
        """
        return sum(self._revoke(portion) for portion in chunks(ids, CHUNK_SIZE))

    def _revoke(self, ids: Sequence[str]) -> int:
        dropped, *known = self._script(
            keys=[CLAIMS, DELAYED_MESSAGES, REVOKED], args=[int(REMEMBERED_S * 1000), MAX_REMEMBERED, *ids]
        )
        if dropped:
            log.error(
                "revokes_dropped",
                jobs=dropped,
                limit=MAX_REMEMBERED,
                meaning="more ids were revoked than the limit; jobs with the oldest ids run if they wait in a lane",
            )
        if not known:
            return 0
        now_ms = server_time_ms(self._client)
        already_answered = self._answer_store.write([_revoked(job_id.decode(), now_ms=now_ms) for job_id in known])
        return len(known) - len(already_answered)


class ShardedRevoker:
    """Carries out revokes in all shards at the same time: a job may be in any of them, as its message says."""

    def __init__(self, shards: Sequence[Revoker]) -> None:
        self._shards = shards

    def revoke(self, ids: Sequence[str]) -> int:
        """Revoke any number of ids. Return how many jobs were answered now.

        Raises:
            redis.RedisError: of one shard, after the others are done; the call may be repeated.
        """
        with ThreadPoolExecutor(min(MAX_THREADS, len(self._shards)), thread_name_prefix="revoke") as pool:
            calls = [pool.submit(shard.revoke, ids) for shard in self._shards]
        return sum(call.result() for call in calls)


def revoke_command(state: Any, task_id: str | Sequence[str] = (), **_: Any) -> dict[str, str]:
    """Handle the remote-control command `revoke`; the reply says whether it was carried out."""
    revoker: Revoker | ShardedRevoker | None = state.app.shiwu_revoker
    if revoker is None:
        return {"error": "not ready yet; revoke again"}
    named = [task_id] if isinstance(task_id, str) else list(task_id)
    ids = []
    for job_id in named:
        with contextlib.suppress(RequestError):
            ids.append(check_id(job_id))
    if len(ids) < len(named):
        log.warning("revokes_ignored", jobs=len(named) - len(ids), meaning="these values cannot be ids of jobs")
    try:
        answered_now = revoker.revoke(ids)
    except redis.RedisError as error:
        log.error("revoke_failed", jobs=len(ids), code=classify(error).value, error=str(error)[:300])
        return {"error": f"{classify(error)}: not revoked; revoke again"}
    log.info("revoked", jobs=len(ids), answered_now=answered_now, ids=ids[:10])
    return {"ok": f"{len(ids)} revoked"}


def _revoked(job_id: str, *, now_ms: float) -> AnswerEntry:
    error = ErrorInfo(code=ErrorCode.CANCELLED, message="revoked by Celery's remote control", stage=Stage.CLAIM)
    answer = Answer(id=job_id, status=Status.CANCELLED, attempts=0, error=error, answered_at=moment(now_ms))
    return AnswerEntry(id=job_id, answer=answer, is_from_outside=True)
