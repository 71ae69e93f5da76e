"""Answers as a consumer meets them: under their key, and in the results stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from shiwu.contract import RESULT_STREAM, Answer, ErrorCode, ErrorInfo, Status
from shiwu.errors import ForeignResult, JobFailed


class TagResult(Answer, frozen=True):
    """An answer with the questions that one usually asks of it."""

    @property
    def ok(self) -> bool:
        """Whether the picture was tagged."""
        return self.status is Status.TAGGED

    @property
    def best(self) -> str | None:
        """The best label, or None."""
        return self.tags[0].label if self.tags else None

    def raise_for_status(self) -> TagResult:
        """Return itself when the picture was tagged, else raise JobFailed with the code and the reason."""
        if self.ok:
            return self
        why = f"{self.error.code}: {self.error.message}" if self.error else self.status.value
        raise JobFailed(why, self)


def read_result(raw: bytes) -> TagResult:
    """Read what lies under a result key, whichever of Celery's states it has.

    Raises:
        ForeignResult: shiwu did not write it.
    """
    try:
        meta = msgspec.json.decode(raw, type=_Meta)
    except msgspec.MsgspecError as error:
        raise ForeignResult(f"expected a result in Celery's JSON form, got {raw[:80]!r} ({error})") from None
    result = meta.result
    if isinstance(result, dict):
        if isinstance(answer := result.get("answer", result), dict) and {"id", "status", "version"} <= answer.keys():
            return msgspec.convert(answer, TagResult)
        if follower := _follower(meta, result):
            return follower
    raise ForeignResult(
        f"expected an answer of shiwu under the id {meta.task_id}, got the result of another Celery task in the state "
        f"{meta.status}; read it by that task's own AsyncResult"
    )


class _Meta(msgspec.Struct):
    """What Celery's JSON results have in common."""

    status: str
    task_id: str
    result: Any = None


def _follower(meta: _Meta, result: dict[str, Any]) -> TagResult | None:
    """The answer of a job that never ran because a job before it in its chain ended without tags."""
    said = result.get("exc_message")
    text = ", ".join(map(str, said)) if isinstance(said, list | tuple) else str(said)
    kind = (meta.status, result.get("exc_module"), result.get("exc_type"))
    if kind == ("REVOKED", "celery.exceptions", "TaskRevokedError"):
        status = Status.EXPIRED if text == Status.EXPIRED else Status.CANCELLED
        code = ErrorCode(status)
    elif kind == ("FAILURE", JobFailed.__module__, JobFailed.__name__):
        status, code = Status.FAILED, ErrorCode.CHAIN_FAILED
    else:
        return None
    error = ErrorInfo(code=code, message=f"a job before this one in its chain ended without tags: {text}")
    return TagResult(id=meta.task_id, status=status, attempts=0, error=error)


@dataclass(frozen=True)
class StreamItem:
    """One entry of the results stream. It stays with this consumer until `ack`."""

    entry_id: str
    result: TagResult
    _client: redis.Redis
    _group: str

    def ack(self) -> None:
        """Say that the answer has had its effect; it is not delivered to this group again."""
        self._client.xack(RESULT_STREAM, self._group, self.entry_id)


def follow(
    client: redis.Redis,
    *,
    group: str,
    consumer: str,
    batch: int,
    block_s: float,
    reclaim_idle_s: float,
    stop_when_idle: bool,
) -> Iterator[StreamItem]:
    """Yield entries: first what this consumer had not acknowledged, then new ones and those of dead consumers."""
    try:
        client.xgroup_create(RESULT_STREAM, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise

    def items(entries: list[Any]) -> Iterator[StreamItem]:
        for entry_id, fields in entries:
            if fields:  # an entry that was trimmed away while pending has none
                answer = TagResult.from_json(fields[b"answer"])
                yield StreamItem(entry_id.decode(), answer, client, group)
            else:
                client.xack(RESULT_STREAM, group, entry_id)

    own = "0"
    while own:
        reply: Any = client.xreadgroup(group, consumer, {RESULT_STREAM: own}, count=batch)
        entries = reply[0][1] if reply else []
        yield from items(entries)
        own = entries[-1][0].decode() if entries else ""
    cursor = "0-0"
    while True:
        claimed: Any = client.xautoclaim(
            RESULT_STREAM, group, consumer, min_idle_time=int(reclaim_idle_s * 1000), start_id=cursor, count=batch
        )
        cursor = claimed[0].decode()
        yield from items(claimed[1])
        fresh: Any = client.xreadgroup(
            group, consumer, {RESULT_STREAM: ">"}, count=batch, block=max(1, int(block_s * 1000))
        )
        entries = fresh[0][1] if fresh else []
        yield from items(entries)
        if stop_when_idle and not entries and not claimed[1]:
            return
