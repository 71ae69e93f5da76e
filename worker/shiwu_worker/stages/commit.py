"""Answers → Redis, with the acknowledgement, in one step.

One script for a whole batch: the first answer of an id is stored in Celery's result format, published to waiters and
appended to the results stream; a later one is discarded. Either way claim, lease and attempts are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Final

import redis
from pydantic_core import to_json

from shiwu.contract import (
    ATTEMPTS,
    CLAIMS,
    COUNTERS,
    DEAD,
    LEASES,
    RESULT_STREAM,
    Answer,
    Status,
    done_key,
    result_key,
)
from shiwu_worker.job import Finished

MAX_COMMIT: Final = 5000
"""Lua's stack holds about 8,000 values, and a commit unpacks one for each job."""
_KINDS: Final = {Status.TAGGED: "S", Status.EXPIRED: "R", Status.CANCELLED: "R"}


def failure_head(answer: Answer) -> bytes:
    """Celery's exception form without its closing brace, so that the server can put the answer in once."""
    if answer.status is Status.TAGGED:
        return b""
    if answer.status in {Status.EXPIRED, Status.CANCELLED}:
        kind, module, message = "TaskRevokedError", "celery.exceptions", answer.status.value
    else:
        error = answer.error
        kind, module = "JobFailed", "shiwu.errors"
        message = f"{error.code}: {error.message}" if error else answer.status.value
    return to_json({"exc_type": kind, "exc_message": [message], "exc_module": module})[:-1]


class Committer:
    """Writes answers. Thread-safe; raises redis.RedisError, after which the same answers may be committed again.

    Args:
        token: unique to this worker's life; by it a commit that is tried again knows its own answers.
        result_ttl_s: how long an answer can be read under its key.
        done_ttl_s: how long an id counts as answered; longer than any redelivery can take.
        stream_length: about how many answers the results stream keeps.
        dead_length: about how many dead letters are kept.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        token: str,
        result_ttl_s: int,
        done_ttl_s: int,
        stream_length: int,
        dead_length: int,
    ) -> None:
        self._token = token
        source = files("shiwu_worker.stages").joinpath("scripts/commit.lua").read_text(encoding="utf-8")
        self._script: Any = client.register_script(source)
        self._limits = [result_ttl_s, done_ttl_s, stream_length, dead_length]

    def commit(self, batch: Sequence[Finished]) -> set[str]:
        """Answer at most MAX_COMMIT jobs; return the ids that somebody had answered before."""
        if not batch:
            return set()
        args: list[Any] = [*self._limits, datetime.now(UTC).isoformat(), done_key(""), result_key("")]
        for item in batch:
            kind = _KINDS.get(item.answer.status, "F") + ("I" if item.ignore_result else "")
            mark = f"{self._token}:{item.answer.attempts}"
            args += [item.id, kind, item.answer.to_json(), failure_head(item.answer), item.dead_raw, mark]
        again: list[bytes] = self._script(keys=[CLAIMS, LEASES, ATTEMPTS, RESULT_STREAM, DEAD, COUNTERS], args=args)
        return {job_id.decode() for job_id in again}
