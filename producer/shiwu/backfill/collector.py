"""Collects the answers of a backfill into parts.

An answer counts when its part is recorded: in one step the part is noted, the counts grow, and its jobs are closed.
Only then the entries of the stream are acknowledged. An entry that comes again is of a closed job, and is dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import msgspec
import redis

from shiwu.backfill.entries import Job, KeptRecord, shown_reference
from shiwu.backfill.open_jobs import OpenJobs
from shiwu.backfill.parts import PartWriter, digest_of, open_part
from shiwu.backfill.plan import OutputFormat
from shiwu.backfill.state import PART, BackfillState, Change, Part, Saved
from shiwu.backfill.targets import PART_NAME
from shiwu.backfill.totals import Totals
from shiwu.broker.chunks import chunks
from shiwu.broker.marks import read_marks
from shiwu.broker.redis_errors import info_of
from shiwu.broker.sharding import by_shard
from shiwu.client.arguments import MAX_TIME_S
from shiwu.client.results import TagResult, read_result
from shiwu.client.sole_consumer import SoleConsumer
from shiwu.client.stream import StreamOptions
from shiwu.client.stream_items import Entry, log
from shiwu.contract import (
    RESULT_STREAM,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Status,
    moment,
    printable,
    result_key,
)
from shiwu.errors import ForeignResult
from shiwu.parts import Target, TargetError

T = TypeVar("T")
READ: Final = 1000
"""Entries that are read in one round trip."""
LOOK_UP: Final = 500
LOOK_UP_IDLE_S: Final = 10.0
"""Seconds between two look-ups of missing answers under their keys, while the stream brings nothing."""
LOOK_UP_BUSY_S: Final = 60.0
"""The same while the stream brings something."""
PART_AGE_S: Final = 600.0
"""A part is completed after this time, with fewer rows."""
COUNT_AGE_S: Final = 1.0
"""The same without an output, where a part is nothing but counts."""
MAX_UNWRITTEN: Final = 5_000
"""Answers without an output that are counted in one step."""


class Collector:
    """Reads the streams of all shards as the only consumer of the group of this backfill. Used by one thread.

    Args:
        clients: read the streams; they do not retry by themselves. One for each shard.
        acks: acknowledge entries and read keys; one for each shard.
        target: None where no results are wanted.
    """

    def __init__(
        self,
        *,
        clients: Sequence[redis.Redis],
        acks: Sequence[redis.Redis],
        state: BackfillState,
        saved: Saved,
        open_jobs: OpenJobs,
        target: Target | None,
        part_rows: int,
        token: str,
    ) -> None:
        self._redis = acks
        self._state = state
        self._open = open_jobs
        self._target = target
        self._part_rows = part_rows
        self._token = token
        self._format: OutputFormat = saved.plan.format
        self.group = group_of(state.name)
        options = StreamOptions(
            group=self.group,
            consumer="backfill",
            is_temporary=False,
            batch=READ,
            block_s=0.0,
            # There is one consumer, and it holds entries until their part is complete.
            reclaim_idle_s=MAX_TIME_S,
            stop_when_idle=False,
            away_s=None,
            on_unreadable=self._unreadable,
        )
        self._consumer = SoleConsumer(clients, acks, options)
        self.totals = saved.totals
        """Over all answers that are recorded."""
        self.parts = dict(saved.parts)
        self._new = Totals()
        self._ids: list[str] = []
        self._entries: list[str] = []
        self._held: set[str] = set()
        self._writer: PartWriter | None = None
        self._began_s = time.monotonic()
        self._looked_up_s = -math.inf
        self.answered_s = time.monotonic()
        """When the last answer came, on the monotonic clock."""

    @property
    def seen(self) -> Totals:
        """Over all answers that came, also those whose part is not complete."""
        return self.totals.plus(self._new)

    # -------------------------------------------------------------------------------- reading
    def step(self, *, block_s: float) -> bool:
        """Read a portion of the stream, and missing answers if it is time; return whether anything came.

        Raises:
            TakenOver: another process runs this backfill.
        """
        if not self._consumer.has_groups:
            # The other process may have ended and deleted the group, which no process would delete again.
            self._state.write(Change())
        entries = self._consumer.read(block_s=block_s)
        self._acknowledge([entry.id for entry in entries if not self._take(entry)])
        if self._is_old():
            self.record()
        pause_s = LOOK_UP_BUSY_S if entries else LOOK_UP_IDLE_S
        if self._open.unanswered and time.monotonic() - self._looked_up_s > pause_s:
            self.look_up()
        return bool(entries)

    def _take(self, entry: Entry) -> bool:
        """Add the answer of an entry to the part; False where it belongs to none."""
        if entry.id in self._held:
            return True
        if not self._add(entry.result):
            return False
        self._entries.append(entry.id)
        self._held.add(entry.id)
        self._record_if_full()
        return True

    def _unreadable(self, entry_id: str, _: Mapping[bytes, bytes], reason: str) -> None:
        """Drop an entry: if it is one of this backfill, its answer is looked up under its key."""
        log.warning("entry %s of %s was skipped: %s", entry_id, RESULT_STREAM, printable(reason))
        self._acknowledge([entry_id])

    def _acknowledge(self, entry_ids: Sequence[str]) -> None:
        if entry_ids:
            self._consumer.acknowledge(entry_ids)

    def look_up(self) -> list[str]:
        """Read answers under their keys that did not come by the stream; return the ids of jobs still without one.

        The stream drops entries that are older than it keeps, also unread ones. Shards that are unavailable are left
        out.
        """

        def read(client: redis.Redis, ids: Sequence[str]) -> Any:
            return client.mget([*map(result_key, ids)])

        missing: list[str] = []
        for job_id, raw in self._ask(list(self._open.without_answer()), read):
            if raw is None:
                missing.append(job_id)
            else:
                self._add(_read(job_id, raw))
                self._record_if_full()
        self._looked_up_s = time.monotonic()
        return missing

    def give_up_lost(self, ids: Sequence[str], *, now_ms: float) -> list[str]:
        """Answer jobs whose answer was made and is no longer kept; return the ids of the others.

        Jobs of a shard that is unavailable are in neither.
        """
        others: list[str] = []
        for job_id, mark in self._ask(ids, read_marks):
            if mark is None:
                others.append(job_id)
            else:
                text = "the job was answered, and its answer is no longer kept; raise SHIWU_RESULT_TTL_S"
                self._add(_failed(job_id, Status.FAILED, ErrorCode.ALREADY_ANSWERED, text, now_ms=now_ms))
        return others

    def _ask(
        self, ids: Sequence[str], read: Callable[[redis.Redis, Sequence[str]], Sequence[T]]
    ) -> Iterator[tuple[str, T]]:
        """Yield (id, what its shard says of it), without the ids of shards that are unavailable."""
        for shard, group in by_shard(ids, shards=len(self._redis), id_of=str).items():
            for portion in chunks(group, LOOK_UP):
                if self._consumer.is_away(shard):
                    break
                try:
                    replies = read(self._redis[shard], portion)
                except (redis.RedisError, OSError) as error:
                    if not info_of(error).is_temporary:
                        raise
                    break
                yield from zip(portion, replies, strict=True)

    def refuse(self, job: Job, *, now_ms: float) -> None:
        """Answer an entry that cannot be a job."""
        record = job.record
        answer = _failed(job.id, Status.REJECTED, record.code, record.error, now_ms=now_ms)
        self._add(msgspec.structs.replace(answer, metadata=record.metadata))
        self._record_if_full()

    def _add(self, answer: TagResult) -> bool:
        if not self._open.answer(answer.id):
            return False
        reference = self._open.reference(answer.id)
        if answer.image is None and reference:
            answer = msgspec.structs.replace(answer, image=ImageInfo(reference=shown_reference(reference)))
        if not self._ids:
            self._began_s = time.monotonic()
        if self._target is not None:
            self._write(answer, self._target)
        self._new.add(answer)
        self._ids.append(answer.id)
        self.answered_s = time.monotonic()
        return True

    def _write(self, answer: TagResult, target: Target) -> None:
        try:
            if self._writer is None:
                self._writer = open_part(target.local(self._part_name()), self._format)
            self._writer.add(answer)
        except OSError as error:
            raise TargetError(f"{target.local(self._part_name())}: {error.strerror or error}") from None

    # -------------------------------------------------------------------------------- recording
    def _part_name(self) -> str:
        return f"{PART_NAME}{len(self.parts) + 1:05}.{self._format}"

    def _is_old(self) -> bool:
        age_s = time.monotonic() - self._began_s
        return bool(self._ids) and age_s > (COUNT_AGE_S if self._target is None else PART_AGE_S)

    def _record_if_full(self) -> None:
        if len(self._ids) >= (MAX_UNWRITTEN if self._target is None else self._part_rows):
            self.record()

    def record(self) -> None:
        """Complete the part: write it, record it, give it its name, acknowledge its entries.

        Raises:
            TargetError: it cannot be written; its answers come again after the next start.
            TakenOver: another process runs this backfill.
        """
        if not self._ids:
            return
        change = Change(increments=dict(self._new.counts), closed=self._ids)
        part = None
        if self._target is not None and self._writer is not None:
            name = self._part_name()
            try:
                self._writer.close()
                size, digest = digest_of(self._writer.path)
            except OSError as error:
                raise TargetError(f"{self._writer.path}: {error.strerror or error}") from None
            staged = self._target.stage(name, token=self._token)
            part = Part(name, self._writer.rows, size, digest, temp=staged)
            self.parts[len(self.parts) + 1] = part
            change.fields[f"{PART}{len(self.parts)}"] = part.to_text()
        self._state.write(change)
        if part is not None and self._target is not None:
            self._target.publish(part.temp, part.name)
            self._state.note(Change({f"{PART}{len(self.parts)}": part.named().to_text()}))
        self._acknowledge(self._entries)
        self._open.close(self._ids)
        self.totals = self.seen
        self._new, self._ids, self._entries, self._held, self._writer = Totals(), [], [], set(), None

    def close(self) -> None:
        """Give up a part that is not complete; its answers come again after the next start."""
        if self._writer is not None:
            # A full disk is why the run ends; the error of this write must not take the place of that.
            with suppress(OSError):
                self._writer.close()
            with suppress(OSError):
                self._writer.path.unlink(missing_ok=True)
            self._writer = None

    def make_group(self) -> None:
        """Create the group before the first job is sent, so that it does not get the answers before."""
        self._state.when_available(self._consumer.make_group)

    def drop_group(self) -> None:
        """Delete the group, so that no stream is kept for it."""
        self._state.when_available(self._consumer.drop_group)


def group_of(name: str) -> str:
    """The consumer group of a backfill."""
    return f"backfill.{name}"


def refused_jobs(records: Sequence[tuple[str, KeptRecord]]) -> list[Job]:
    """Those of the open jobs that were never sent, because their entries cannot be jobs."""
    return [Job(job_id, kept.record, None) for job_id, kept in records if kept.record.error]


def _read(job_id: str, raw: bytes) -> TagResult:
    try:
        return read_result(raw)
    except ForeignResult as error:
        info = ErrorInfo(code=ErrorCode.ANSWER_UNREADABLE, message=str(error))
        return TagResult(id=job_id, status=Status.FAILED, error=info)


def _failed(job_id: str, status: Status, code: str, text: str, *, now_ms: float) -> TagResult:
    error = ErrorInfo(code=code, message=text)
    return TagResult(id=job_id, status=status, attempts=0, error=error, answered_at=moment(now_ms))
