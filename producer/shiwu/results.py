"""Answers as a consumer meets them: under their key, and in the results stream."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import redis

from shiwu.contract import RESULT_STREAM, Answer, ErrorCode, ErrorInfo, Status
from shiwu.errors import ForeignResult, JobFailed

MAX_REPORTED: Final = 10_000
"""Entries that cannot be read and are remembered, so that each is reported once."""


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
        why = f"{self.error.code}: {self.error.message}" if self.error else str(self.status)
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
            return _read_fields(answer, job_id=meta.task_id)
        if follower := _follower(meta, result):
            return follower
    raise ForeignResult(
        f"expected an answer of shiwu under the id {meta.task_id}, got the result of another Celery task in the state "
        f"{meta.status}; read it by that task's own AsyncResult"
    )


def read_answer(raw: bytes, *, job_id: str) -> TagResult:
    """Read an answer as JSON; one that this version cannot read gives a result with the code `answer_unreadable`."""
    try:
        return TagResult.from_json(raw)
    except ValueError as error:
        return _unreadable(job_id, error)


def _read_fields(answer: dict[str, Any], *, job_id: str) -> TagResult:
    try:
        return msgspec.convert(answer, TagResult)
    except ValueError as error:
        return _unreadable(job_id, error)


def _unreadable(job_id: str, error: ValueError) -> TagResult:
    text = f"expected an answer that this version of the client can read ({error!s:.200}); upgrade the client"
    return TagResult(id=job_id, status=Status.FAILED, error=ErrorInfo(code=ErrorCode.ANSWER_UNREADABLE, message=text))


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


@dataclass(frozen=True)
class UnreadableItem:
    """An entry of the results stream that this version of the client cannot read.

    It stays pending, so that the group gets it again after the client was upgraded; `ack` gives it up.
    """

    entry_id: str
    fields: Mapping[bytes, bytes]
    reason: str
    _client: redis.Redis
    _group: str

    def ack(self) -> None:
        """Give the entry up: it is not delivered to this group again."""
        self._client.xack(RESULT_STREAM, self._group, self.entry_id)


def log_unreadable(item: UnreadableItem) -> None:
    """Write a warning to the logger `shiwu`."""
    logging.getLogger("shiwu").warning(
        "entry %s of %s was skipped and stays pending: %s", item.entry_id, RESULT_STREAM, item.reason
    )


def follow(
    client: redis.Redis,
    *,
    group: str,
    consumer: str,
    batch: int,
    block_s: float,
    reclaim_idle_s: float,
    stop_when_idle: bool,
    on_unreadable: Callable[[UnreadableItem], None],
) -> Iterator[StreamItem]:
    """Yield entries: first what this consumer had not acknowledged, then new ones and those of dead consumers.

    Args:
        on_unreadable: told once of each entry that cannot be read; such entries are skipped.
    """
    try:
        client.xgroup_create(RESULT_STREAM, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise

    items = _Items(client, group, on_unreadable).of
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
        reclaimed = items(claimed[1])
        yield from reclaimed
        fresh: Any = client.xreadgroup(
            group, consumer, {RESULT_STREAM: ">"}, count=batch, block=max(1, int(block_s * 1000))
        )
        entries = fresh[0][1] if fresh else []
        yield from items(entries)
        if stop_when_idle and not entries and not reclaimed:
            return


class _Items:
    """Turns entries into items, and reports each entry that cannot be read once."""

    def __init__(self, client: redis.Redis, group: str, on_unreadable: Callable[[UnreadableItem], None]) -> None:
        self._client = client
        self._group = group
        self._on_unreadable = on_unreadable
        self._reported: OrderedDict[bytes, None] = OrderedDict()

    def of(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> list[StreamItem]:
        """The entries that can be read."""
        items = []
        for entry_id, fields in entries:
            if not fields:  # an entry that was trimmed away while pending has none
                self._client.xack(RESULT_STREAM, self._group, entry_id)
                continue
            try:
                items.append(StreamItem(entry_id.decode(), _read_entry(fields), self._client, self._group))
            except ValueError as error:
                self._report(entry_id, fields, str(error)[:300])
        return items

    def _report(self, entry_id: bytes, fields: dict[bytes, bytes], reason: str) -> None:
        if entry_id not in self._reported:
            self._on_unreadable(UnreadableItem(entry_id.decode(), fields, reason, self._client, self._group))
        self._reported[entry_id] = None
        while len(self._reported) > MAX_REPORTED:
            self._reported.popitem(last=False)


def _read_entry(fields: Mapping[bytes, bytes]) -> TagResult:
    """Read an entry of the results stream.

    Raises:
        ValueError: it has no answer, or one that this version cannot read.
    """
    if (raw := fields.get(b"answer")) is None:
        raise ValueError("expected a field `answer`, got none")
    return TagResult.from_json(raw)
