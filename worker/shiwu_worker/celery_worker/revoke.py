"""Celery's revoke: the jobs that a broadcast names are cancelled."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import redis
import structlog

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

log: Any = structlog.get_logger()
REMEMBERED_S: Final = 10_800.0
"""As long as Celery remembers a revoke."""
MAX_REMEMBERED: Final = 50_000
"""As many as Celery remembers."""
BATCH_LIMIT: Final = 1000
"""Ids in one script; more are revoked by another."""


class Revoker:
    """Carries a revoke out: known jobs are answered at once, the others when they are claimed."""

    def __init__(self, client: redis.Redis, answer_store: AnswerStore) -> None:
        self._client = client
        self._answer_store = answer_store
        self._script = load_script(client, "revoke")

    def revoke(self, ids: Sequence[str]) -> int:
        """Return how many were answered now. Any number of ids is revoked, portion by portion.

        Raises:
            redis.RedisError: and then it may be asked again.
        """
        return sum(self._revoke(portion) for portion in chunks(ids, BATCH_LIMIT))

    def _revoke(self, ids: Sequence[str]) -> int:
        forgotten, *ours = self._script(
            keys=[CLAIMS, DELAYED_MESSAGES, REVOKED], args=[int(REMEMBERED_S * 1000), MAX_REMEMBERED, *ids]
        )
        if forgotten:
            log.error(
                "revokes_dropped",
                jobs=forgotten,
                limit=MAX_REMEMBERED,
                meaning="more ids were revoked than are remembered; jobs of the oldest ones run if they wait in a lane",
            )
        if not ours:
            return 0
        now_ms = server_time_ms(self._client)
        again = self._answer_store.write([_revoked(job_id.decode(), now_ms=now_ms) for job_id in ours])
        return len(ours) - len(again)


def revoke_command(state: Any, task_id: str | Sequence[str] = (), **_: Any) -> dict[str, str]:
    """Carry out the command as Celery's `Observability` would; the reply tells whether it was."""
    revoker: Revoker | None = state.app.shiwu_revoker
    if revoker is None:
        return {"error": "not ready yet; revoke again"}
    asked = [task_id] if isinstance(task_id, str) else list(task_id)
    ids = []
    for job_id in asked:
        with contextlib.suppress(RequestError):
            ids.append(check_id(job_id))
    if len(ids) < len(asked):
        log.warning("revokes_ignored", jobs=len(asked) - len(ids), meaning="what was named cannot be the id of a job")
    try:
        now = revoker.revoke(ids)
    except redis.RedisError as error:
        log.error("revoke_failed", jobs=len(ids), code=classify(error).value, error=str(error)[:300])
        return {"error": f"{classify(error)}: not revoked; revoke again"}
    log.info("revoked", jobs=len(ids), answered_now=now, ids=ids[:10])
    return {"ok": f"{len(ids)} revoked"}


def _revoked(job_id: str, *, now_ms: float) -> AnswerEntry:
    error = ErrorInfo(code=ErrorCode.CANCELLED, message="revoked by Celery's remote control", stage=Stage.CLAIM)
    answer = Answer(id=job_id, status=Status.CANCELLED, attempts=0, error=error, answered_at=moment(now_ms))
    return AnswerEntry(id=job_id, answer=answer, is_from_outside=True)
