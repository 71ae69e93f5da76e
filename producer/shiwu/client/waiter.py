"""Waits for answers: listens on their channels, and polls their keys.

A message on a channel may be lost with a connection, but the key stays. So a waiter listens, and polls now and then.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import redis

from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import ConnectionsBusy, info_of
from shiwu.broker.steps import Steps, run
from shiwu.client.announcements import read_announcement, subscribe
from shiwu.client.results import TagResult, read_result
from shiwu.contract import ErrorCode, RequestError, result_key
from shiwu.errors import WaitTimeout

LISTENING_POLL_S: Final = 2.0
"""Seconds between two polls of a waiter that listens."""
POLL_S: Final = 0.25
"""Seconds between two polls of a waiter without a connection to listen on."""
RETRY_PAUSE_S: Final = 0.25
"""Pause after an error of Redis."""
CHUNK_SIZE: Final = 500


def as_answered(
    client: redis.Redis, listener: redis.Redis, ids: Sequence[str], *, timeout_s: float
) -> Iterator[tuple[str, TagResult]]:
    """Yield (id, answer) in the order in which answers come; end after the last one or after `timeout_s`.

    Args:
        client: polls keys; it holds a connection for one command.
        listener: subscribes; it holds a connection during the wait. Where it has no connection left, this polls more
            often instead, so that any number of threads may wait.

    Raises:
        RequestError: `timeout_s` is NaN.
        redis.RedisError: an error that a retry cannot cure (see `shiwu.broker.redis_errors`).
    """
    if math.isnan(timeout_s):
        raise RequestError(ErrorCode.INVALID_REQUEST, "timeout_s: expected a number of seconds, got nan")
    missing = dict.fromkeys(ids)
    until_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while missing:
        try:
            yield from _wait_once(client, listener, missing, until_s=until_s)
        except (redis.RedisError, OSError) as error:
            if not info_of(error).is_temporary:
                raise
            pause.wait(max(0.0, min(RETRY_PAUSE_S, until_s - time.monotonic())))
        if time.monotonic() >= until_s:
            return


def collect(answers: Iterable[tuple[str, TagResult]], ids: Sequence[str], *, timeout_s: float) -> dict[str, TagResult]:
    """Gather (id, answer) pairs; return id → answer in the order of `ids`.

    Raises:
        WaitTimeout: `answers` ended without an answer for each id.
    """
    found = dict(answers)
    if missing := [job_id for job_id in ids if job_id not in found]:
        raise WaitTimeout(
            f"expected {len(ids)} answers within {timeout_s:g} s, {len(missing)} are missing, first {missing[0]}"
        )
    return {job_id: found[job_id] for job_id in ids}


def _wait_once(
    client: redis.Redis, listener: redis.Redis, missing: dict[str, None], *, until_s: float
) -> Iterator[tuple[str, TagResult]]:
    """Yield answers and remove their ids from `missing`, until none is missing, the time is over, or Redis fails."""
    with listener.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]  # redis' own
        # Subscribes first and polls afterwards, so that an answer in between is not missed.
        try:
            subscribe(pubsub, list(missing))
        except ConnectionsBusy:
            yield from _poll(client, missing)
            threading.Event().wait(max(0.0, min(POLL_S, until_s - time.monotonic())))
            return
        while missing:
            yield from _poll(client, missing)
            poll_at_s = time.monotonic() + LISTENING_POLL_S
            while missing and (left_s := min(poll_at_s, until_s) - time.monotonic()) > 0:
                message = pubsub.get_message(timeout=left_s)
                if message is not None:
                    job_id, raw = read_announcement(message)
                    if job_id in missing:
                        del missing[job_id]
                        yield job_id, read_result(raw)
            if time.monotonic() >= until_s:
                return


def _poll(client: redis.Redis, missing: dict[str, None]) -> Iterator[tuple[str, TagResult]]:
    for portion in chunks(list(missing), CHUNK_SIZE):
        for job_id, raw in run(client, look_steps(portion)):
            del missing[job_id]
            yield job_id, read_result(raw)


def look_steps(ids: Sequence[str]) -> Steps[list[tuple[str, bytes]]]:
    """Look for the answers of up to CHUNK_SIZE ids; return (id, value of the result key) of those that are there."""
    replies = yield lambda client: client.mget([result_key(job_id) for job_id in ids])
    return [(job_id, raw) for job_id, raw in zip(ids, replies, strict=True) if raw is not None]
