"""From checked requests to messages in a lane."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import redis

from shiwu.broker.answers import wait_replicated
from shiwu.broker.connection import run_on_connection
from shiwu.broker.message_writer import build_message
from shiwu.broker.queue_stats import count_waiting
from shiwu.broker.redis_errors import NotReplicated, explain, info_of
from shiwu.broker.server_clock import server_time_ms
from shiwu.broker.trace_headers import current_headers
from shiwu.client.arguments import read_seconds, read_whole, refused
from shiwu.contract import DEADLINES, Lane, Request
from shiwu.errors import QueueFull

CLOCK_S: Final = 60.0
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
REPORT_EVERY_S: Final = 30.0
log: Final = logging.getLogger("shiwu")
MAX_PRIORITY: Final = 9
_STEPS: Final = (0, 3, 6, 9)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How jobs are sent, all times in seconds from now."""

    lane: Lane
    expires_s: float | None = None
    answer_by_s: float | None = None
    countdown_s: float | None = None
    priority: int = 0
    replicas: int = 0
    max_waiting: int | None = None
    """How many messages the lane may hold; None: what the client allows."""
    wait_s: float = 0.0
    """How long a portion may wait for room in the lane, or for Redis."""

    def __post_init__(self) -> None:
        """Refuse what would have no effect, or only one that no caller wants."""
        for name in ("expires_s", "answer_by_s", "countdown_s"):
            if (value := getattr(self, name)) is not None:
                read_seconds(name, value)
        ends_s = min((end for end in (self.expires_s, self.answer_by_s) if end is not None), default=math.inf)
        if self.countdown_s is not None and self.countdown_s >= ends_s:
            raise refused("countdown_s", f"less than the {ends_s:g} s after which the job expires", self.countdown_s)
        read_whole("priority", self.priority, most=MAX_PRIORITY)
        read_whole("replicas", self.replicas)
        if self.max_waiting is not None:
            read_whole("max_waiting", self.max_waiting, least=1)
        if self.wait_s != math.inf:
            read_seconds("wait_s", self.wait_s)


def read_lane(lane: Lane | str) -> Lane:
    """The lane of this name.

    Raises:
        RequestError: there is none.
    """
    try:
        return Lane(lane)
    except (ValueError, TypeError):
        raise refused("lane", " or ".join(Lane), lane) from None


class Sender:
    """Sends messages, and keeps Redis' clock. Thread-safe."""

    def __init__(self, client: redis.Redis, *, max_waiting: int, timeout_s: float) -> None:
        self._redis = client
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._offset_ms = 0.0
        self._offset_until_s = 0.0

    def send(self, jobs: Sequence[tuple[Request, str]], terms: SendOptions) -> list[str]:
        """Put (request, id) pairs into their lane in one step; return the ids.

        While the lane is full or Redis is away they are sent again for `terms.wait_s`. Since they keep their ids, a
        message that had arrived after all is a copy, which is answered once.

        Raises:
            QueueFull: the lane holds its limit.
            NotReplicated: they are in the lane, but too few replicas know it yet.
            redis.RedisError: Redis did not take them; whether they arrived is not known after a time-out.
        """
        began_s = time.monotonic()
        told_s = -math.inf
        pause_s = 0.0
        while True:
            try:
                return self._send(jobs, terms)
            except (QueueFull, redis.RedisError) as error:
                can_pass = isinstance(error, QueueFull) or info_of(error).passes
                now_s = time.monotonic()
                if not can_pass or isinstance(error, NotReplicated) or now_s - began_s >= terms.wait_s:
                    raise
                if now_s - told_s >= REPORT_EVERY_S:
                    told_s = now_s
                    text = str(error) if isinstance(error, QueueFull) else explain(error)
                    log.warning("%s; waiting (%.0f s so far)", text, now_s - began_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2 or FIRST_PAUSE_S)
            Event().wait(pause_s)

    def room(self, terms: SendOptions) -> int:
        """How many messages the lane may hold, and so the largest portion that can ever be sent."""
        return self._max_waiting if terms.max_waiting is None else terms.max_waiting

    def _send(self, jobs: Sequence[tuple[Request, str]], terms: SendOptions) -> list[str]:
        lane, limit = terms.lane, self.room(terms)
        waiting = count_waiting(self._redis, [lane])[lane]
        if waiting + len(jobs) > limit:
            raise QueueFull(
                f"expected room for {len(jobs)} in lane {lane}, which holds {waiting} of {limit}; "
                "try later, or raise max_waiting"
            )
        now_ms = self.server_time_ms()
        answer_by_ms = _later(now_ms, terms.answer_by_s)
        expires_ms = min((ms for ms in (_later(now_ms, terms.expires_s), answer_by_ms) if ms), default=None)
        trace = current_headers()
        messages = [
            build_message(
                request,
                job_id=job_id,
                lane=lane,
                sent_ms=now_ms,
                expires_ms=expires_ms,
                eta_ms=_later(now_ms, terms.countdown_s),
                priority=terms.priority,
                trace=trace,
            )
            for request, job_id in jobs
        ]
        step = max((i for i, lowest in enumerate(_STEPS) if lowest <= terms.priority), default=0)
        deadlines = {} if answer_by_ms is None else {job_id: answer_by_ms for _, job_id in jobs}
        self._write(lane.keys[step], messages, deadlines, replicas=terms.replicas)
        return [job_id for _, job_id in jobs]

    def _write(self, key: str, messages: Sequence[bytes], deadlines: Mapping[str, float], *, replicas: int) -> None:
        if not replicas:
            with self._redis.pipeline(transaction=True) as pipe:
                if deadlines:
                    pipe.zadd(DEADLINES, deadlines)
                pipe.lpush(key, *messages)
                pipe.execute()
            return
        commands: list[Sequence[Any]] = [("LPUSH", key, *messages)]
        if deadlines:
            members = [part for job_id, by_ms in deadlines.items() for part in (by_ms, job_id)]
            commands.insert(0, ("ZADD", DEADLINES, *members))
        # On one connection, because WAIT is about the writes of its own.
        with self._redis.client() as one:  # type: ignore[no-untyped-call]  # redis' own
            run_on_connection(one, *commands)
            wait_replicated(one, replicas=replicas, timeout_s=self._timeout_s / 2)

    def server_time_ms(self) -> float:
        """Redis' clock, in ms since 1970: the only one that all sides share. Looked up once a minute."""
        if time.monotonic() >= self._offset_until_s:
            before_s = time.monotonic()
            server_ms = server_time_ms(self._redis)
            after_s = time.monotonic()
            # The reply was made about half way between the two readings.
            self._offset_ms = server_ms - (before_s + after_s) / 2 * 1000
            self._offset_until_s = after_s + CLOCK_S
        return time.monotonic() * 1000 + self._offset_ms


def _later(now_ms: float, seconds: float | None) -> float | None:
    return None if seconds is None else now_ms + seconds * 1000
