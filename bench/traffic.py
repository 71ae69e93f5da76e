"""Sends messages and receives answers for all systems alike, in Celery's own format.

An answer counts from the moment at which a consumer can read it: shiwu and Celery both announce it on the channel of
its result key in the same step that stores it, and one subscriber receives them all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import msgspec
import redis
from pydantic_core import from_json
from tests.support.waiting import wait_until

from shiwu.broker.chunks import chunks
from shiwu.broker.message_writer import build_message
from shiwu.contract import Lane, Request, Timing, result_key

CHUNK_SIZE: Final = 1000
"""Number of messages or keys in one command."""
POLL_INTERVAL_S: Final = 0.2
_PREFIX: Final = result_key("")


@dataclass(frozen=True, slots=True)
class Message:
    """A job that can be sent."""

    id: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of one job, from shiwu or a peer."""

    id: str
    is_tagged: bool
    tags: tuple[tuple[str, float], ...]
    """Labels and scores, best first."""
    timing: Timing
    batch_size: int | None
    dtype: str
    text: str
    """Error text of a job that is not tagged."""


def server_version(client: redis.Redis) -> str:
    """Return a text such as `valkey 9.1.2`."""
    info: Any = client.info("server")
    return f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {info['redis_version']}"


def build(
    references: Sequence[str], *, count: int, prefix: str, lane: Lane, after_s: Sequence[float] = ()
) -> list[Message]:
    """Build `count` jobs that use these references in turn.

    Args:
        after_s: when each will be sent, seconds from now; by default immediately.
    """
    now_ms = time.time() * 1000
    requests = [Request(image=reference) for reference in references]
    found = []
    for number in range(count):
        job_id = f"{prefix}-{number}"
        sent_ms = now_ms + 1000 * after_s[number] if after_s else now_ms
        raw = build_message(requests[number % len(requests)], job_id=job_id, lane=lane, sent_ms=sent_ms)
        found.append(Message(job_id, raw))
    return found


def send(client: redis.Redis, lane: Lane, messages: Sequence[Message]) -> None:
    """Enqueue the messages as fast as Redis accepts them."""
    for part in chunks(messages, CHUNK_SIZE):
        client.lpush(lane.queue, *[message.raw for message in part])


def missing(client: redis.Redis, ids: Sequence[str]) -> int:
    """Return how many of these ids have no readable answer."""
    found = (client.exists(*[result_key(job_id) for job_id in part]) for part in chunks(ids, CHUNK_SIZE))
    return len(ids) - sum(map(int, found))


def read_all(client: redis.Redis, ids: Sequence[str]) -> list[Reply]:
    """Return the answers of these ids, in their order, also those without tags and the missing ones."""
    raws: list[Any] = []
    for part in chunks(ids, CHUNK_SIZE):
        raws += client.mget([result_key(job_id) for job_id in part])
    return [_reply(job_id, raw) for job_id, raw in zip(ids, raws, strict=True)]


def read(client: redis.Redis, ids: Sequence[str]) -> list[Reply]:
    """Return the answers of these ids, in their order.

    Raises:
        RuntimeError: an answer is missing or has no tags.
    """
    replies = read_all(client, ids)
    wrong = [reply for reply in replies if not reply.is_tagged]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(replies)} jobs have no tags, the first: {wrong[0].id}: {wrong[0].text}"
        )
    return replies


def _reply(job_id: str, raw: bytes | None) -> Reply:
    if raw is None:
        return Reply(job_id, is_tagged=False, tags=(), timing=Timing(), batch_size=None, dtype="", text="no answer")
    meta = from_json(raw)
    result = meta["result"]
    is_tagged = meta["status"] == "SUCCESS"
    return Reply(
        id=job_id,
        is_tagged=is_tagged,
        tags=tuple((tag["label"], tag["score"]) for tag in result["tags"]) if is_tagged else (),
        timing=msgspec.convert(result.get("timing") or {}, Timing) if is_tagged else Timing(),
        batch_size=result.get("batch_size") if is_tagged else None,
        dtype=(result.get("model") or {}).get("dtype", "") if is_tagged else "",
        text="" if is_tagged else str(result)[:300],
    )


class Listener:
    """Records when each answer can be read.

    Args:
        prefix: how the ids begin whose answers are awaited.
    """

    def __init__(self, client: redis.Redis, *, prefix: str = "") -> None:
        self._prefix = prefix
        self._pubsub = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]  # redis' own
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="answers", daemon=True)
        self.arrivals: dict[str, float] = {}
        """id → moment of its first answer, on the monotonic clock."""

    def __enter__(self) -> Self:
        self._pubsub.psubscribe(f"{_PREFIX}{self._prefix}*")
        self._pubsub.get_message(timeout=5.0)  # the server confirmed the subscription: no later answer is missed
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(10 * POLL_INTERVAL_S)
        self._pubsub.close()

    def wait(self, count: int, *, timeout_s: float, check: Callable[[], None], every_s: float = 0.005) -> None:
        """Wait until `count` jobs are answered; `check` raises if no worker is left.

        Raises:
            TimeoutError: they are not answered in time.
        """

        def have_arrived() -> bool:
            check()
            return len(self.arrivals) >= count

        wait_until(have_arrived, timeout_s=timeout_s, every_s=every_s, what=f"{count} answers")

    def _listen(self) -> None:
        while not self._closed.is_set():
            message = self._pubsub.get_message(timeout=POLL_INTERVAL_S)
            if message is not None:
                job_id = message["channel"].decode().removeprefix(_PREFIX)
                self.arrivals.setdefault(job_id, time.monotonic())


@contextmanager
def listening(client: redis.Redis, *, prefix: str = "") -> Iterator[Listener]:
    """Clear the database and open a listener on it, for answers of ids with this prefix."""
    client.flushall()
    with Listener(client, prefix=prefix) as listener:
        yield listener
