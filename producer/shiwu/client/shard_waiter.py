"""Waits for answers in several shards: one thread listens to a connection for each shard.

A shard that is unavailable holds up the others for one command at most, and is asked again after a growing pause.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from typing import Any

import redis

from shiwu.broker.backoff import Backoff
from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import ConnectionsBusy, info_of
from shiwu.broker.sharding import by_shard
from shiwu.broker.steps import run
from shiwu.client.announcements import read_announcement, subscribe
from shiwu.client.results import TagResult, read_result
from shiwu.client.waiter import CHUNK_SIZE, LISTENING_POLL_S, POLL_S, as_answered, look_steps

MAX_PAUSE_S = 5.0
"""Longest pause before a shard that was unavailable is asked again."""


def as_answered_in_shards(
    clients: Sequence[redis.Redis], listeners: Sequence[redis.Redis], ids: Sequence[str], *, timeout_s: float
) -> Iterator[tuple[str, TagResult]]:
    """Yield (id, answer) in the order in which answers come; end after the last one or after `timeout_s`.

    Args:
        clients, listeners: as for `shiwu.client.waiter.as_answered`, one of each for every shard.

    Raises:
        redis.RedisError: an error that a retry cannot cure (see `shiwu.broker.redis_errors`).
    """
    groups = by_shard(ids, shards=len(clients), id_of=str)
    if len(groups) <= 1:
        for shard, group in groups.items():
            yield from as_answered(clients[shard], listeners[shard], group, timeout_s=timeout_s)
        return
    until_s = time.monotonic() + timeout_s
    waits = [_ShardWait(clients[shard], listeners[shard], group) for shard, group in groups.items()]
    try:
        while True:
            for wait in waits:
                for job_id, raw in wait.take():
                    yield job_id, read_result(raw)
            waits = _unfinished(waits)
            now_s = time.monotonic()
            if not waits or now_s >= until_s:
                return
            due_s = min(wait.due_s for wait in waits)
            _wait_readable(waits, timeout_s=min(due_s, until_s) - now_s)
    finally:
        for wait in waits:
            wait.close()


def _unfinished(waits: list[_ShardWait]) -> list[_ShardWait]:
    for wait in waits:
        if not wait.missing:
            wait.close()
    return [wait for wait in waits if wait.missing]


class _ShardWait:
    """The wait for the answers of one shard."""

    def __init__(self, client: redis.Redis, listener: redis.Redis, ids: Sequence[str]) -> None:
        self._client = client
        self._listener = listener
        self._backoff = Backoff(max_s=MAX_PAUSE_S)
        self._pubsub: Any = None
        self.missing = dict.fromkeys(ids)
        self.due_s = 0.0
        """When to look for the keys next, by the monotonic clock."""

    @property
    def connection(self) -> Any:
        """The connection that listens; None while there is none."""
        return None if self._pubsub is None else self._pubsub.connection

    def take(self) -> list[tuple[str, bytes]]:
        """The answers that have come; looks for keys if that is due.

        Raises:
            redis.RedisError: an error that a retry cannot cure.
        """
        found: list[tuple[str, bytes]] = []
        try:
            if time.monotonic() >= self.due_s:
                found += self._look()
            found += self._read()
        except (redis.RedisError, OSError) as error:
            if not info_of(error).is_temporary:
                raise
            self.close()
            self.due_s = time.monotonic() + self._backoff.next_s()
        return found

    def close(self) -> None:
        """Give the connection back, without subscriptions."""
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _look(self) -> Iterator[tuple[str, bytes]]:
        """Subscribe, if that is not done yet, and look for keys afterwards, so that no answer is missed."""
        is_listening = self._pubsub is not None or self._listen()
        self.due_s = time.monotonic() + (LISTENING_POLL_S if is_listening else POLL_S)
        for portion in chunks(list(self.missing), CHUNK_SIZE):
            for job_id, raw in run(self._client, look_steps(portion)):
                del self.missing[job_id]
                yield job_id, raw
        self._backoff.reset()

    def _listen(self) -> bool:
        """Subscribe; False where the client has no connection left to listen on."""
        self._pubsub = self._listener.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]  # redis' own
        try:
            subscribe(self._pubsub, list(self.missing))
        except ConnectionsBusy:
            self.close()
            return False
        return True

    def _read(self) -> Iterator[tuple[str, bytes]]:
        while self.connection is not None and self.connection.can_read(timeout=0):
            message = self._pubsub.get_message(timeout=0)
            if message is None:
                continue
            job_id, raw = read_announcement(message)
            if job_id in self.missing:
                del self.missing[job_id]
                yield job_id, raw


def _wait_readable(waits: Sequence[_ShardWait], *, timeout_s: float) -> None:
    """Wait until a connection has something to read."""
    sockets = [wait.connection._sock for wait in waits if wait.connection is not None]  # redis-py has no public name
    poll = select.poll()
    for each in sockets:
        if each is not None:
            poll.register(each, select.POLLIN)
    poll.poll(max(0.0, timeout_s) * 1000)
