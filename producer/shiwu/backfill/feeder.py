"""Reads the source and sends jobs, portion by portion.

A portion is registered first: cursor and records in one step. Then it is sent, and then recorded as sent. A process
that starts after a crash sends again what is registered in the last portion and not recorded as sent; the ids absorb
the copies. So no entry is skipped, and none is read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import redis

from shiwu.backfill.entries import Entry, Job, JobMaker, KeptRecord
from shiwu.backfill.open_jobs import MAX_PORTION, OpenJobs, RecentJobs
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.sources.base import Source
from shiwu.backfill.state import BackfillState, Change, Saved
from shiwu.broker.backoff import Backoff
from shiwu.broker.marks import read_marks
from shiwu.broker.redis_errors import explain, info_of
from shiwu.broker.sharding import by_shard
from shiwu.broker.steps import run
from shiwu.client.sender import Sender, SendOptions, read_lane
from shiwu.contract import Request, result_key
from shiwu.errors import QueueFull

GATHER_S: Final = 0.5
"""How long one portion is gathered at most."""
MAX_SCANNED: Final = 20_000
"""Entries that one portion reads at most, where filters leave most of them out."""
LEAST_SHARE: Final = 0.1
"""A portion is sent when this share of `max_waiting` is free, so that portions do not become tiny."""


class RateLimit:
    """How many jobs may be sent now; saves up for a second at most.

    Args:
        rate: jobs a second, or None for no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._saved = 1.0
        self._counted_s = time.monotonic()

    def free(self, wanted: int) -> int:
        """How many of the wanted jobs may be sent."""
        if self._rate is None:
            return wanted
        now_s = time.monotonic()
        self._saved = min(max(1.0, self._rate), self._saved + self._rate * (now_s - self._counted_s))
        self._counted_s = now_s
        return min(wanted, int(self._saved))

    def sent(self, count: int) -> None:
        """Record that jobs were sent."""
        self._saved -= count


class Feeder:
    """Sends the jobs of one backfill. Used by one thread.

    Args:
        clients: one for each shard.
        is_answered_skipped: ask Redis for each job whether it was answered before, and skip it then.
        on_refused: called with each job that cannot be sent, when it is registered.
    """

    def __init__(
        self,
        *,
        clients: tuple[redis.Redis, ...],
        sender: Sender,
        state: BackfillState,
        saved: Saved,
        maker: JobMaker,
        source: Source,
        open_jobs: OpenJobs,
        recent: RecentJobs,
        pace: Pace,
        is_answered_skipped: bool,
        on_refused: Callable[[Job], None],
    ) -> None:
        self._redis = clients
        self._sender = sender
        self._options = SendOptions(read_lane(pace.lane))
        self._state = state
        self._plan: Plan = saved.plan
        self._maker = maker
        self._source = source
        self._entries: Iterator[Entry] | None = None
        self._open = open_jobs
        self._recent = recent
        self._pace = pace
        self._rate = RateLimit(pace.rate)
        self._is_answered_skipped = is_answered_skipped
        self._on_refused = on_refused
        self.cursor = saved.cursor
        self.read = saved.counts["read"]
        self.left_out = saved.counts["left_out"]
        self.sent = saved.counts["sent"]
        self.is_source_done = saved.is_source_done
        self._portion = saved.portion
        self._waiting: list[tuple[Request, str]] = []
        """Jobs that are registered and not sent."""
        self._backoff = Backoff()
        self._retry_s = 0.0
        self.trouble = ""
        """Why the last portion could not be sent; empty if it could."""

    @property
    def is_done(self) -> bool:
        """Whether all of the source was sent."""
        return self.is_source_done and not self._waiting

    def send_again(self, jobs: Sequence[tuple[str, KeptRecord]], *, is_lost: bool = False) -> None:
        """Let `step` send these registered jobs next.

        Args:
            is_lost: they were sent, and are sent again because no answer came.
        """
        made = [self._maker.again(job_id, kept.record) for job_id, kept in jobs]
        self._waiting += [(job.request, job.id) for job in made if job.request is not None]
        if is_lost:
            self._state.note(Change(increments={"resent": len(self._waiting)}))

    def step(self, *, is_reading: bool = True) -> bool:
        """Send one portion if there is one and space for it; return whether something was done.

        Args:
            is_reading: also read and register a new portion, and not only send what is registered.
        """
        if self._waiting:
            return self._try_send()
        if not is_reading or self.is_source_done or (free := self._free()) < 1:
            return False
        self._register(free)
        return True if not self._waiting else self._try_send()

    def _free(self) -> int:
        limit = self._pace.max_waiting
        portion = min(MAX_PORTION, limit)
        free = limit - self._open.unanswered
        if free < min(portion, max(1, int(limit * LEAST_SHARE))):
            return 0
        return self._rate.free(min(portion, free))

    # -------------------------------------------------------------------------------- reading
    def _register(self, limit: int) -> None:
        entries, is_done, scanned = self._gather(limit)
        jobs: dict[str, Job] = {}
        for entry in entries:
            job = self._maker.make(entry)
            if job.id not in self._open:
                jobs[job.id] = job
        for job_id in self._answered_before([job_id for job_id in jobs if job_id not in self._recent.lost]):
            del jobs[job_id]
        counts = {"read": scanned, "left_out": scanned - len(entries), "repeated": len(entries) - len(jobs)}
        counts["sent"] = sum(1 for job in jobs.values() if job.request is not None)
        fields = {"cursor": self.cursor, "portion": str(self._portion + 1)}
        if is_done:
            fields["source_done"] = "1"
        opened = [(job.id, KeptRecord(self._portion + 1, job.record).to_bytes()) for job in jobs.values()]
        self._state.write(Change(fields, counts, opened=opened))
        self._portion += 1
        self._recent.register(self._portion, list(jobs))
        self.read += scanned
        self.left_out += counts["left_out"]
        self.sent += counts["sent"]
        self.is_source_done = is_done
        self._open.open((job.id, job.record.image) for job in jobs.values())
        for job in jobs.values():
            if job.request is None:
                self._on_refused(job)
            else:
                self._waiting.append((job.request, job.id))
        self._confirm()

    def _gather(self, limit: int) -> tuple[list[Entry], bool, int]:
        """The next entries that pass the filters, whether the source has ended, and how many entries were read."""
        if self._entries is None:
            self._entries = iter(self._source.entries(self.cursor))
        found: list[Entry] = []
        scanned = 0
        until_s = time.monotonic() + GATHER_S
        for entry in self._entries:
            scanned += 1
            self.cursor = entry.cursor
            if self._plan.keeps(entry):
                found.append(entry)
            if len(found) >= limit or scanned >= MAX_SCANNED or (not scanned % 100 and time.monotonic() > until_s):
                return found, False, scanned
        return found, True, scanned

    def _answered_before(self, ids: list[str]) -> list[str]:
        if not self._is_answered_skipped or not ids:
            return []
        is_thorough = self._pace.is_missing_only
        return self._state.when_available(lambda: answered_before(self._redis, ids, is_thorough=is_thorough))

    # -------------------------------------------------------------------------------- sending
    def _try_send(self) -> bool:
        """Send the registered jobs; False where the lane is full or Redis is unavailable, until a later try."""
        if time.monotonic() < self._retry_s:
            return False
        portion = self._waiting[:MAX_PORTION]
        try:
            run(self._redis, self._sender.send_steps(portion, self._options))
        except (QueueFull, redis.RedisError) as error:
            if not isinstance(error, QueueFull) and not info_of(error).is_temporary:
                raise
            self.trouble = str(error) if isinstance(error, QueueFull) else explain(error)
            self._retry_s = time.monotonic() + self._backoff.next_s()
            return False
        self.trouble = ""
        self._backoff.reset()
        self._waiting = self._waiting[MAX_PORTION:]
        self._rate.sent(len(portion))
        self._confirm()
        return True

    def _confirm(self) -> None:
        if not self._waiting:
            self._state.note(Change({"sent_portion": str(self._portion)}))


def answered_before(clients: Sequence[redis.Redis], ids: Sequence[str], *, is_thorough: bool) -> list[str]:
    """Those of the ids that have the mark of an answer.

    Args:
        clients: one for each shard.
        is_thorough: also those with an answer that is kept longer than its mark.
    """
    groups = by_shard(ids, shards=len(clients), id_of=str)
    return [
        job_id
        for shard, group in groups.items()
        for job_id in _answered_in_shard(clients[shard], group, is_thorough=is_thorough)
    ]


def _answered_in_shard(client: redis.Redis, ids: Sequence[str], *, is_thorough: bool) -> list[str]:
    found = [job_id for job_id, mark in zip(ids, read_marks(client, ids), strict=True) if mark is not None]
    if is_thorough and (rest := set(ids).difference(found)):
        found += _with_value(client, {result_key(job_id): job_id for job_id in rest})
    return found


def _with_value(client: redis.Redis, ids: Mapping[str, str]) -> list[str]:
    """The ids whose keys have a value."""
    values: Any = client.mget(list(ids))
    return [job_id for job_id, value in zip(ids.values(), values, strict=True) if value is not None]
