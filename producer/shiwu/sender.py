"""From checked requests to messages in a lane."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from shiwu.connection import call_held
from shiwu.contract import DEADLINES, ErrorCode, Lane, Request, RequestError
from shiwu.errors import QueueFull
from shiwu.ledger import wait_replicated
from shiwu.message import build_message
from shiwu.queues import count_waiting
from shiwu.trace import current_headers

CLOCK_S: Final = 60.0
MAX_TIME_S: Final = 10 * 365 * 86_400.0
MAX_PRIORITY: Final = 9
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

    def __post_init__(self) -> None:
        """Refuse what would have no effect, or only one that no caller wants."""
        for name in ("expires_s", "answer_by_s", "countdown_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TIME_S:
                raise _refused(name, f"seconds from now, 0 to {MAX_TIME_S:.0f}, or None", value)
        ends_s = min((end for end in (self.expires_s, self.answer_by_s) if end is not None), default=math.inf)
        if self.countdown_s is not None and self.countdown_s >= ends_s:
            raise _refused("countdown_s", f"less than the {ends_s:g} s after which the job expires", self.countdown_s)
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise _refused("priority", f"0 (most urgent) to {MAX_PRIORITY}", self.priority)
        if self.replicas < 0:
            raise _refused("replicas", "0 or more", self.replicas)


def read_lane(lane: Lane | str) -> Lane:
    """The lane of this name.

    Raises:
        RequestError: there is none.
    """
    try:
        return Lane(lane)
    except ValueError:
        raise _refused("lane", " or ".join(Lane), lane) from None


def _refused(name: str, expected: str, value: object) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, f"{name}: expected {expected}, got {value!r:.80}")


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
            call_held(one, *commands)
            wait_replicated(one, replicas=replicas, timeout_s=self._timeout_s / 2)

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
