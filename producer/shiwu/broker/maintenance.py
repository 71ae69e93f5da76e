"""Maintenance of the queue: requeues jobs whose lease expired, answers jobs out of time, trims the results stream.

Every worker runs it once a second, on a cluster the watchers of a shard (`shiwu_worker.policy.watchers`), and `shiwu
sweep` runs it where no worker may be running. Any number of processes may run it at the same time: each step is one
script, and only the first answer of a job counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import Any, Final

import redis

from shiwu.broker.answers import MAX_CALLBACKS_RESERVED_S, AnswerStore
from shiwu.broker.expiry import CHUNK_SIZE, MAX_CHECKED, Expiry
from shiwu.broker.foreign_values import ForeignValue, ForeignValues
from shiwu.broker.queue_stats import WORKER_TIMEOUT_MS
from shiwu.broker.retention import DEFAULT_RETENTION, Retention
from shiwu.broker.script_loader import load_repeatable_script, load_script
from shiwu.broker.server_clock import server_time_ms
from shiwu.contract import (
    ATTEMPTS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    HISTORIES,
    HISTORIES_EXPIRY,
    LEASES,
    MARKS,
    PENDING_ANSWERS,
    PENDING_ANSWERS_EXPIRY,
    QUARANTINE,
    QUARANTINE_OWNER,
    RESULT_STREAM,
    REVOKED,
    SCAN_OWNER,
    SCAN_WANTED,
    WORKERS,
    Lane,
)

QUARANTINE_AFTER_DEATHS: Final = 2
"""Worker deaths after which a job is put into quarantine."""
MAX_LEASE_S: Final = 600.0
"""The longest lease. Longer ones are shortened, as after the server's clock was set back."""
MAX_TRIM: Final = 5000
"""Entries that one call removes from the results stream, and dead letters."""
HISTORY_TTL_S: Final = 7 * 86_400
"""How long the history of a job that returned to its lane is kept for its next claim."""
MAX_ROUNDS: Final = 40
"""Rounds that follow each other while more is due; the rest waits for the next tick or sweep."""
SCAN_OWNED_S: Final = 15.0
"""How long a process that looks through the lanes owns this task without a sign of life."""
_LANE_KEYS: Final = tuple(key for lane in Lane for key in lane.keys)
_MAINTENANCE_KEYS: Final = (
    *(CLAIMS, LEASES, ATTEMPTS, DELAYED, DELAYED_MESSAGES, COUNTERS, WORKERS, QUARANTINE, DEADLINES),
    *(DEAD, DEAD_ANSWERS, DEAD_MESSAGES, RESULT_STREAM, REVOKED, QUARANTINE_OWNER, CANVAS_DUE),
    *(SCAN_WANTED, SCAN_OWNER, PENDING_ANSWERS, PENDING_ANSWERS_EXPIRY, HISTORIES, HISTORIES_EXPIRY, *MARKS),
    *_LANE_KEYS,
)


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one round of maintenance did, and the queue sizes that it counted."""

    reaped: int = 0
    """Jobs requeued because their lease expired."""
    promoted: int = 0
    """Jobs returned to their lane because their delay was over."""
    quarantined: int = 0
    """Jobs that wait in quarantine."""
    waiting: int = 0
    """Messages in quarantine, and in all lanes if `count_waiting` was set."""
    stream_length: int = 0
    stream_bytes: int = 0
    """As the scripts count them; entries that another program removed are still counted."""
    dead_bytes: int = 0
    out_of_time: int = 0
    """Jobs answered `expired` because the time of `answer_by_s` was over."""
    deadlines_due: int = 0
    """Entries of the deadlines that were due."""

    @property
    def is_full(self) -> bool:
        """Whether more may be due of one kind than one round with the default limit does."""
        return max(self.reaped, self.promoted, self.deadlines_due) >= CHUNK_SIZE


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did."""

    reaped: int
    """Jobs requeued because their lease expired."""
    promoted: int
    """Jobs returned to their lane because their delay was over."""
    out_of_time: int
    """Jobs answered `expired` because the time of `answer_by_s` was over."""
    expired: int
    """Waiting messages answered `expired` because their `expires` had passed."""
    results_dropped: dict[str, int]
    """Consumer group → unacknowledged answers that were trimmed from the stream."""
    not_looked_at: int = 0
    """Waiting messages of long lanes that later sweeps check."""
    foreign: Sequence[ForeignValue] = ()
    """Values of a wrong type that were moved away from the keys of shiwu."""

    @property
    def did_something(self) -> bool:
        """Whether the sweep changed anything."""
        done = (self.reaped, self.promoted, self.out_of_time, self.expired, self.results_dropped, self.foreign)
        return any(done)


class Maintenance:
    """Does maintenance. Thread-safe; every method may raise redis.RedisError, after which it may be called again.

    Args:
        name: the worker's name, whose heartbeat each round records; empty for a process that is not a worker.
        token: unique to one run of the process; marks the answers that it writes.
        retention: called in each round; how many answers the results stream keeps, and how long dead letters are kept.
        zone: time zone of an `expires` without one.
    """

    def __init__(
        self,
        client: redis.Redis,
        answer_store: AnswerStore,
        *,
        name: str = "",
        token: str = "",
        retention: Callable[[], Retention] = lambda: DEFAULT_RETENTION,
        zone: tzinfo = UTC,
    ) -> None:
        self._client = client
        self._answer_store = answer_store
        self._name = name
        self._token = token
        self._retention = retention
        self._zone = zone
        self._maintain = load_script(client, "maintain")
        self._trim = load_repeatable_script(client, "trim")
        self._trim_dead = load_repeatable_script(client, "trim_dead")
        self._measured: set[str] = set()
        self._foreign_values = ForeignValues(client)
        self._expiry = Expiry(client, answer_store, token=token)

    def note_worker(self) -> list[str]:
        """Record the heartbeat of this worker; return the names of all workers with one in the last ten seconds."""
        now_ms = server_time_ms(self._client)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zadd(WORKERS, {self._name: now_ms})
            pipe.zrangebyscore(WORKERS, now_ms - WORKER_TIMEOUT_MS, "+inf")
            _, names = pipe.execute()
        return [name.decode(errors="replace") for name in names]

    def move_foreign(self) -> list[ForeignValue]:
        """Move values of a wrong type away from the keys of shiwu; return what was moved. No script runs before it."""
        return self._foreign_values.move()

    def run_once(
        self, *, limit: int = CHUNK_SIZE, count_waiting: bool = False, zone: tzinfo | None = None
    ) -> MaintenanceReport:
        """Do what is due, up to `limit` jobs of each kind.

        Args:
            count_waiting: also count the messages in all lanes.
            zone: replaces the time zone of an `expires` without one.
        """
        zone = zone or self._zone
        limits = (
            QUARANTINE_AFTER_DEATHS,
            int(MAX_LEASE_S * 1000),
            self._retention().dead_age_s * 1000,
            HISTORY_TTL_S,
            int(MAX_CALLBACKS_RESERVED_S * 1000),
            self._token,
            self._expiry.scanned_ms,
            int(SCAN_OWNED_S * 1000),
            *_LANE_KEYS,
        )
        reply: Any = self._maintain(keys=_MAINTENANCE_KEYS, args=[self._name, limit, int(count_waiting), *limits])
        reaped, promoted, quarantined, waiting, stream_length, due, now_ms = reply[:7]
        stream_bytes, dead_bytes, is_scanning, late = reply[7:]
        out_of_time = self._expiry.answer_due(dict(zip(late[::2], late[1::2], strict=True)), now_ms=now_ms, zone=zone)
        if is_scanning:
            out_of_time += self._expiry.scan(now_ms=now_ms, zone=zone)
        return MaintenanceReport(
            reaped=reaped,
            promoted=promoted,
            quarantined=quarantined,
            waiting=waiting,
            stream_length=stream_length,
            stream_bytes=stream_bytes,
            dead_bytes=dead_bytes,
            out_of_time=out_of_time,
            deadlines_due=due,
        )

    def sweep(self, *, zone: tzinfo = UTC) -> SweepReport:
        """Do everything that is due, and answer waiting messages whose `expires` has passed.

        Args:
            zone: time zone of an `expires` without one.
        """
        foreign = self.move_foreign()
        rounds = [self.run_once(limit=CHUNK_SIZE, zone=zone)]
        while rounds[-1].is_full and len(rounds) < MAX_ROUNDS:
            rounds.append(self.run_once(limit=CHUNK_SIZE, zone=zone))
        expired, unchecked = self._expiry.expire_waiting(portion=CHUNK_SIZE, limit=MAX_CHECKED, zone=zone)
        expired += self._expiry.expire_quarantined(zone=zone)
        return SweepReport(
            reaped=sum(report.reaped for report in rounds),
            promoted=sum(report.promoted for report in rounds),
            out_of_time=sum(report.out_of_time for report in rounds),
            expired=expired,
            not_looked_at=unchecked,
            results_dropped=self.trim_if_long(rounds[-1]),
            foreign=foreign,
        )

    def trim(self, *, bytes_over: int = 0) -> dict[str, int]:
        """Trim the results stream; return how many unacknowledged answers each consumer group lost.

        Args:
            bytes_over: how many bytes to free, also where the number of entries is within its limit.
        """
        reply: Any = self._trim(
            keys=[RESULT_STREAM, COUNTERS], args=[self._retention().stream_length, MAX_TRIM, bytes_over]
        )
        return {reply[i].decode(errors="replace"): reply[i + 1] for i in range(1, len(reply), 2)}

    def trim_dead(self, *, bytes_over: int) -> int:
        """Drop the oldest dead letters until so many bytes are free; return how many were dropped."""
        reply: Any = self._trim_dead(keys=[DEAD, DEAD_ANSWERS, DEAD_MESSAGES, COUNTERS], args=[bytes_over, MAX_TRIM])
        return int(reply[0])

    def trim_if_long(self, report: MaintenanceReport) -> dict[str, int]:
        """Trim the dead letters and the results stream if this report found them too large.

        Otherwise without a round trip, except for one measurement at the first call.
        """
        limits = self._retention()
        dead_over = self._bytes_over("dead_bytes", (DEAD_ANSWERS, DEAD_MESSAGES), report.dead_bytes, limits.dead_bytes)
        if dead_over > 0:
            self.trim_dead(bytes_over=dead_over)
        stream_over = self._bytes_over("results_bytes", (RESULT_STREAM,), report.stream_bytes, limits.stream_bytes)
        is_long = stream_over > 0 or report.stream_length > limits.stream_length
        return self.trim(bytes_over=stream_over) if is_long else {}

    def _bytes_over(self, counter: str, keys: Sequence[str], counted: int, limit: int) -> int:
        """By how many bytes these keys exceed the limit; 0 where the count is within it.

        The scripts count what they add. What other programs remove, and what older versions added, is not counted, so
        the keys are measured once at the start, and before anything is dropped.
        """
        if counted <= limit and counter in self._measured:
            return 0
        try:
            measured = sum(self._client.memory_usage(key, samples=0) or 0 for key in keys)
        except redis.ResponseError:
            return 0  # an ACL without MEMORY USAGE; the count alone would drop too much
        with contextlib.suppress(redis.ResponseError):  # a full server refuses it
            self._client.hset(COUNTERS, counter, measured)
        self._measured.add(counter)
        return measured - limit

    def expire_waiting(self, *, portion: int = CHUNK_SIZE, limit: int = MAX_CHECKED, zone: tzinfo = UTC) -> int:
        """Answer waiting messages whose `expires` has passed; return how many.

        Workers do this when they claim; this method does it while no worker runs. It checks `limit` messages of each
        lane key, oldest first, and continues from there at the next call.
        """
        return self._expiry.expire_waiting(portion=portion, limit=limit, zone=zone)[0]
