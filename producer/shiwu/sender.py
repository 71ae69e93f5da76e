"""From checked requests to messages in a lane."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from shiwu.contract import DEADLINES, Lane, Request
from shiwu.errors import QueueFull
from shiwu.ledger import wait_replicated
from shiwu.message import build_message
from shiwu.queues import count_waiting
from shiwu.trace import current_headers

CLOCK_S: Final = 60.0
_STEPS: Final = (0, 3, 6, 9)


@dataclass(frozen=True, slots=True)
class Terms:
    """How jobs are sent, all times in seconds from now."""

    lane: Lane
    expires_s: float | None = None
    answer_by_s: float | None = None
    countdown_s: float | None = None
    priority: int = 0
    replicas: int = 0


class Sender:
    """Sends messages, and keeps Redis' clock. Thread-safe."""

    def __init__(self, client: redis.Redis, *, max_waiting: int, timeout_s: float) -> None:
        self._redis = client
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._offset_ms = 0.0
        self._offset_until_s = 0.0

    def send(self, jobs: Sequence[tuple[Request, str]], terms: Terms) -> list[str]:
        """Put (request, id) pairs into their lane in one step; return the ids.

        Raises:
            QueueFull: the lane holds its limit.
            NotReplicated: they are in the lane, but too few replicas know it yet.
        """
        lane = terms.lane
        waiting = count_waiting(self._redis, [lane])[lane]
        if waiting + len(jobs) > self._max_waiting:
            raise QueueFull(
                f"expected room for {len(jobs)} in lane {lane}, which holds {waiting} of {self._max_waiting}; "
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
        # One connection for all: WAIT speaks of the writes of its own.
        with self._redis.client() as one:  # type: ignore[no-untyped-call]  # redis' own
            with one.pipeline(transaction=True) as pipe:
                if answer_by_ms is not None:
                    pipe.zadd(DEADLINES, {job_id: answer_by_ms for _, job_id in jobs})
                pipe.lpush(lane.keys[step], *messages)
                pipe.execute()
            if terms.replicas:
                wait_replicated(one, replicas=terms.replicas, timeout_s=self._timeout_s / 2)
        return [job_id for _, job_id in jobs]

    def server_time_ms(self) -> float:
        """Redis' clock, in ms since 1970: the only one that all sides share. Looked up once a minute."""
        if time.monotonic() >= self._offset_until_s:
            before_s = time.monotonic()
            reply: Any = self._redis.time()
            after_s = time.monotonic()
            # The reply was made about half way between the two readings.
            self._offset_ms = reply[0] * 1000 + reply[1] / 1000 - (before_s + after_s) / 2 * 1000
            self._offset_until_s = after_s + CLOCK_S
        return time.monotonic() * 1000 + self._offset_ms


def _later(now_ms: float, seconds: float | None) -> float | None:
    return None if seconds is None else now_ms + seconds * 1000
