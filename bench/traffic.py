"""Messages out, answers in: for every system alike, in Celery's own format on both sides.

An answer counts from the moment at which a consumer can read it: shiwu and Celery both announce it on the channel of
its result key in the same step that stores it, and one subscriber hears them all.
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

from shiwu.broker.message_writer import build_message
from shiwu.contract import Lane, Request, Timing, result_key

CHUNK_SIZE: Final = 1000
"""Messages or keys in one command."""
HEAR_S: Final = 0.2
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
    """What it says where it is not tagged."""


def server_version(client: redis.Redis) -> str:
    """`valkey 9.1.2`."""
    info: Any = client.info("server")
    return f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {info['redis_version']}"


def build(
    references: Sequence[str], *, count: int, prefix: str, lane: Lane, after_s: Sequence[float] = ()
) -> list[Message]:
    """So many jobs over these references in turn.

    Args:
        after_s: when each will be sent, seconds from now; by default at once.
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
    """Put them into the lane as fast as Redis takes them."""
    for start in range(0, len(messages), CHUNK_SIZE):
        client.lpush(lane.queue, *[one.raw for one in messages[start : start + CHUNK_SIZE]])


def missing(client: redis.Redis, ids: Sequence[str]) -> int:
    """How many of these ids have no answer that can be read, counted id by id."""
    parts = (ids[start : start + CHUNK_SIZE] for start in range(0, len(ids), CHUNK_SIZE))
    return len(ids) - sum(int(client.exists(*[result_key(one) for one in part])) for part in parts)


def read(client: redis.Redis, ids: Sequence[str]) -> list[Reply]:
    """The answers of these ids, in their order.

    Raises:
        RuntimeError: one is missing, or ended without tags.
    """
    raws: list[Any] = []
    for start in range(0, len(ids), CHUNK_SIZE):
        raws += client.mget([result_key(one) for one in ids[start : start + CHUNK_SIZE]])
    replies = [_reply(job_id, raw) for job_id, raw in zip(ids, raws, strict=True)]
    wrong = [one for one in replies if not one.is_tagged]
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
    """Hears every answer at the moment at which it can be read."""

    def __init__(self, client: redis.Redis) -> None:
        self._pubsub = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]  # redis' own
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._hear, name="answers", daemon=True)
        self.arrivals: dict[str, float] = {}
        """id → moment of its first answer, on the monotonic clock."""

    def __enter__(self) -> Self:
        self._pubsub.psubscribe(f"{_PREFIX}*")
        self._pubsub.get_message(timeout=5.0)  # the server has confirmed: nothing is missed from here on
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(10 * HEAR_S)
        self._pubsub.close()

    def wait(self, count: int, *, timeout_s: float, check: Callable[[], None], every_s: float = 0.005) -> None:
        """Wait until so many jobs have been answered; `check` raises where nobody can answer any more.

        Raises:
            TimeoutError: they have not.
        """

        def are_there() -> bool:
            check()
            return len(self.arrivals) >= count

        wait_until(are_there, timeout_s=timeout_s, every_s=every_s, what=f"{count} answers")

    def _hear(self) -> None:
        while not self._closed.is_set():
            message = self._pubsub.get_message(timeout=HEAR_S)
            if message is not None:
                job_id = message["channel"].decode().removeprefix(_PREFIX)
                self.arrivals.setdefault(job_id, time.monotonic())


@contextmanager
def listening(client: redis.Redis) -> Iterator[Listener]:
    """A clean database, and a listener on it."""
    client.flushall()
    with Listener(client) as listener:
        yield listener
