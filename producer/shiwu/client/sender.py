"""Writes checked requests as messages into a lane."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import redis

from shiwu.broker.answers import check_replicated, wait_command
from shiwu.broker.backoff import Backoff
from shiwu.broker.message_writer import build_message
from shiwu.broker.queue_stats import waiting_steps
from shiwu.broker.redis_errors import NotReplicated, explain, info_of
from shiwu.broker.server_clock import server_time_steps
from shiwu.broker.sharding import by_shard
from shiwu.broker.steps import OnOneConnection, OnShards, Pause, Steps, on_shards, results_of
from shiwu.broker.trace_headers import current_headers
from shiwu.client.arguments import read_integer, read_seconds, refused
from shiwu.contract import DEADLINES, MAX_MESSAGE_BYTES, ErrorCode, Lane, Request, RequestError, check_id, parse_request
from shiwu.errors import QueueFull

CLOCK_REFRESH_S: Final = 60.0
"""How long the offset of Redis' clock is used before it is measured again."""
REPORT_EVERY_S: Final = 30.0
log: Final = logging.getLogger("shiwu")
MAX_PRIORITY: Final = 9
MakeId = Callable[[Request], str]
Job: TypeAlias = tuple[Request, str]
"""A request and the id of its job."""
_PRIORITY_STEPS: Final = (0, 3, 6, 9)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How jobs are sent; all durations are in seconds from now."""

    lane: Lane
    expires_s: float | None = None
    answer_by_s: float | None = None
    countdown_s: float | None = None
    priority: int = 0
    replicas: int = 0
    max_waiting: int | None = None
    """How many messages the lane may hold; None: the limit of the client."""
    wait_s: float = 0.0
    """How long a portion may wait for space in the lane or for Redis; may be infinite."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            RequestError: an option is invalid, or the job would expire before its countdown ends.
        """
        for name in ("expires_s", "answer_by_s", "countdown_s"):
            if (value := getattr(self, name)) is not None:
                read_seconds(name, value)
        ends_s = min((end for end in (self.expires_s, self.answer_by_s) if end is not None), default=math.inf)
        if self.countdown_s is not None and self.countdown_s >= ends_s:
            raise refused("countdown_s", f"less than the {ends_s:g} s after which the job expires", self.countdown_s)
        read_integer("priority", self.priority, most=MAX_PRIORITY)
        read_integer("replicas", self.replicas)
        if self.max_waiting is not None:
            read_integer("max_waiting", self.max_waiting, least=1)
        if self.wait_s != math.inf:
            read_seconds("wait_s", self.wait_s)


def read_lane(lane: Lane | str) -> Lane:
    """The lane with this name.

    Raises:
        RequestError: there is no such lane.
    """
    try:
        return Lane(lane)
    except (ValueError, TypeError):
        raise refused("lane", " or ".join(Lane), lane) from None


class ServerClock:
    """Estimates Redis' clock between measurements. Thread-safe."""

    def __init__(self) -> None:
        self._offset_ms = 0.0
        self._offset_until_s = 0.0

    def now_steps(self) -> Steps[float]:
        """Redis' clock in ms since 1970, measured once a minute and estimated in between."""
        if time.monotonic() >= self._offset_until_s:
            before_s = time.monotonic()
            server_ms = yield from server_time_steps()
            after_s = time.monotonic()
            # The server read its clock about half way between the two readings here.
            self._offset_ms = server_ms - (before_s + after_s) / 2 * 1000
            self._offset_until_s = after_s + CLOCK_REFRESH_S
        return time.monotonic() * 1000 + self._offset_ms


class Sender:
    """Says how messages are sent, each to the shard of its id. Thread-safe.

    Each method that returns steps sends nothing before they are run.

    Args:
        max_waiting: how many messages a lane may hold, over all shards; each has an equal part of it.
        shards: how many there are.
    """

    def __init__(self, *, max_waiting: int, timeout_s: float, shards: int = 1) -> None:
        self._default_max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._shards = shards
        self._clocks = tuple(ServerClock() for _ in range(shards))

    def send_steps(self, jobs: Sequence[Job], options: SendOptions) -> Steps[list[str]]:
        """Put (request, id) pairs into their lane, those of a shard in one step; return the ids.

        While the lane is full or Redis is unavailable, it retries for `options.wait_s`. A message that was enqueued
        before a time-out is then a duplicate with the same id, and the job is answered once.

        Raises:
            QueueFull: the lane holds its limit.
            RequestError: a message is too large; nothing was sent.
            NotReplicated: the messages are in the lane, but too few replicas confirmed them.
            redis.RedisError: Redis is unavailable or refused the messages. After a time-out they may be in the lane.
                Over shards, messages of the others are in the lane.
        """
        began_s = time.monotonic()
        reported_s = -math.inf
        backoff = Backoff()
        left = by_shard(jobs, shards=self._shards, id_of=_id_of)
        while left:
            try:
                yield from self._send_once_steps(left, options)
                continue
            except (QueueFull, redis.RedisError) as error:
                may_pass = isinstance(error, QueueFull) or info_of(error).is_temporary
                now_s = time.monotonic()
                if not may_pass or isinstance(error, NotReplicated) or now_s - began_s >= options.wait_s:
                    raise
                if now_s - reported_s >= REPORT_EVERY_S:
                    reported_s = now_s
                    text = str(error) if isinstance(error, QueueFull) else explain(error)
                    log.warning("%s; waiting (%.0f s so far)", text, now_s - began_s)
            yield Pause(backoff.next_s())
        return [job_id for _, job_id in jobs]

    def send_items_steps(
        self, items: Sequence[tuple[dict[str, Any], str | None]], options: SendOptions, *, make_id: MakeId
    ) -> Steps[list[str]]:
        """Check (request fields, id) pairs, and send all of them in one step; return the ids.

        Args:
            make_id: gives the id of an item without one.

        Raises:
            RequestError: an item is invalid or too large; nothing was sent. Otherwise raises the errors of
                `send_steps`.
        """
        jobs: list[Job] = []
        try:
            for fields, job_id in items:
                request = parse_request(fields)
                jobs.append((request, check_id(make_id(request) if job_id is None else job_id)))
        except RequestError as error:
            error.item = len(jobs)
            raise
        return (yield from self.send_steps(jobs, options))

    def max_waiting(self, options: SendOptions) -> int:
        """How many messages the lane may hold over all shards, which is also the size of the largest portion."""
        return self._default_max_waiting if options.max_waiting is None else options.max_waiting

    def server_time_steps(self, shard: int = 0) -> Steps[float]:
        """The clock of a shard's node in ms since 1970, measured once a minute and estimated in between."""
        return self._clocks[shard].now_steps()

    def _send_once_steps(self, left: dict[int, list[Job]], options: SendOptions) -> Steps[None]:
        """Send once to each shard what it may hold; remove what was sent from `left`.

        All shards are asked for space first, so that a full one leaves nothing sent.
        """
        limit = max(1, -(-self.max_waiting(options) // self._shards))
        # More than a shard may hold goes there in several steps.
        parts = {shard: jobs[:limit] for shard, jobs in left.items()}
        found = yield from on_shards({shard: self._look_steps(shard, options.lane) for shard in parts})
        clocks = {shard: now_ms for shard, (_, now_ms) in found.items()}
        for shard, part in parts.items():
            self._check_space(shard, options.lane, waiting=found[shard][0], wanted=len(part), limit=limit)
        messages = {shard: _write_messages(part, options, now_ms=clocks[shard]) for shard, part in parts.items()}
        for shard, part in parts.items():
            _check_sizes(messages[shard], part)
        outcomes = yield OnShards(
            {
                shard: self._put_steps(part, messages[shard], options, now_ms=clocks[shard])
                for shard, part in parts.items()
            }
        )
        for shard, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                continue
            left[shard] = left[shard][limit:]
            if not left[shard]:
                del left[shard]
        results_of(outcomes)

    def _look_steps(self, shard: int, lane: Lane) -> Steps[tuple[int, float]]:
        """How many messages wait in a lane of a shard, and the time of its server."""
        waiting = (yield from waiting_steps([lane]))[lane]
        return waiting, (yield from self.server_time_steps(shard))

    def _check_space(self, shard: int, lane: Lane, *, waiting: int, wanted: int, limit: int) -> None:
        """Check that a lane has space.

        Raises:
            QueueFull: it has not.
        """
        if waiting + wanted > limit:
            where = f"lane {lane}" if self._shards == 1 else f"lane {lane} of shard {shard}"
            raise QueueFull(
                f"expected space for {wanted} messages in {where}, which holds {waiting} of {limit}; "
                "try later, or raise max_waiting"
            )

    def _put_steps(
        self, jobs: Sequence[Job], messages: Sequence[bytes], options: SendOptions, *, now_ms: float
    ) -> Steps[None]:
        answer_by_ms = _later(now_ms, options.answer_by_s)
        if answer_by_ms is not None:
            deadlines = {job_id: answer_by_ms for _, job_id in jobs}
            # An index only: the messages carry their deadlines, and count without it.
            with contextlib.suppress(redis.ResponseError):
                yield lambda client: client.zadd(DEADLINES, deadlines)
        step = max((i for i, lowest in enumerate(_PRIORITY_STEPS) if lowest <= options.priority), default=0)
        yield from self._push_steps(options.lane.keys[step], messages, replicas=options.replicas)

    def _push_steps(self, key: str, messages: Sequence[bytes], *, replicas: int) -> Steps[None]:
        if not replicas:
            yield lambda client: client.lpush(key, *messages)
            return
        timeout_s = self._timeout_s / 2
        wait = wait_command(replicas=replicas, timeout_s=timeout_s)
        _, reached = yield OnOneConnection((("LPUSH", key, *messages), wait))
        check_replicated(reached, replicas=replicas, timeout_s=timeout_s)


def _id_of(job: Job) -> str:
    return job[1]


def _write_messages(jobs: Sequence[Job], options: SendOptions, *, now_ms: float) -> list[bytes]:
    answer_by_ms = _later(now_ms, options.answer_by_s)
    expires_ms = min((ms for ms in (_later(now_ms, options.expires_s), answer_by_ms) if ms), default=None)
    trace = current_headers()
    return [
        build_message(
            request,
            job_id=job_id,
            lane=options.lane,
            sent_ms=now_ms,
            expires_ms=expires_ms,
            answer_by_ms=answer_by_ms,
            eta_ms=_later(now_ms, options.countdown_s),
            priority=options.priority,
            trace=trace,
        )
        for request, job_id in jobs
    ]


def _check_sizes(messages: Sequence[bytes], jobs: Sequence[Job]) -> None:
    """Refuse what every worker would refuse, after it had taken up to three times its size in Redis.

    Raises:
        RequestError: message_too_large.
    """
    for raw, (_, job_id) in zip(messages, jobs, strict=True):
        if len(raw) > MAX_MESSAGE_BYTES:
            text = f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, job {job_id} has {len(raw)}"
            raise RequestError(ErrorCode.MESSAGE_TOO_LARGE, f"{text}; send fewer or shorter inline labels")


def _later(now_ms: float, seconds: float | None) -> float | None:
    return None if seconds is None else now_ms + seconds * 1000
