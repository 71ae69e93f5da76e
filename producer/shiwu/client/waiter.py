"""Waiting for answers: announced on their channels, and looked up under their keys.

An announcement may be lost with a connection; the key stays. So whoever waits listens, and looks again now and then.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import redis

from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import ConnectionsBusy, info_of
from shiwu.client.results import TagResult, read_result
from shiwu.contract import RESULT_PREFIX, ErrorCode, RequestError, result_key

POLL_EVERY_S: Final = 2.0
POLL_S: Final = 0.25
AWAY_S: Final = 0.25
CHUNK_SIZE: Final = 500


def as_answered(
    client: redis.Redis, listener: redis.Redis, ids: Sequence[str], *, timeout_s: float
) -> Iterator[tuple[str, TagResult]]:
    """Yield (id, answer) as they come; end when all have come or the time is over.

    Args:
        client: looks at keys; it holds a connection for one command.
        listener: subscribes; it holds a connection for as long as this waits. Where it has none left, this looks at
            the keys more often instead, so that any number of threads may wait.

    Raises:
        RequestError: `timeout_s` is nan, which would never be over.
        redis.RedisError: an error that does not pass by itself (`shiwu.broker.redis_errors`); others are waited for.
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
            if not info_of(error).passes:
                raise
            pause.wait(max(0.0, min(AWAY_S, until_s - time.monotonic())))
        if time.monotonic() >= until_s:
            return


def _wait_once(
    client: redis.Redis, listener: redis.Redis, missing: dict[str, None], *, until_s: float
) -> Iterator[tuple[str, TagResult]]:
    """Take found answers out of `missing`, until there is none left, the time is over, or Redis fails."""
    with listener.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]  # redis' own
        # Subscribe first and look afterwards: an answer between the two is then seen at least once.
        portions = chunks(list(missing), CHUNK_SIZE)
        try:
            pubsub.subscribe(*map(result_key, next(portions)))
        except ConnectionsBusy:
            yield from _look(client, missing)
            threading.Event().wait(max(0.0, min(POLL_S, until_s - time.monotonic())))
            return
        for portion in portions:
            pubsub.subscribe(*map(result_key, portion))
        while missing:
            yield from _look(client, missing)
            look_s = time.monotonic() + POLL_EVERY_S
            while missing and (left_s := min(look_s, until_s) - time.monotonic()) > 0:
                message = pubsub.get_message(timeout=left_s)
                if message is not None:
                    job_id = message["channel"].decode().removeprefix(RESULT_PREFIX)
                    if job_id in missing:
                        del missing[job_id]
                        yield job_id, read_result(message["data"])
            if time.monotonic() >= until_s:
                return


def _look(client: redis.Redis, missing: dict[str, None]) -> Iterator[tuple[str, TagResult]]:
    for portion in chunks(list(missing), CHUNK_SIZE):
        replies: Any = client.mget([result_key(job_id) for job_id in portion])
        for job_id, raw in zip(portion, replies, strict=True):
            if raw is not None:
                del missing[job_id]
                yield job_id, read_result(raw)
