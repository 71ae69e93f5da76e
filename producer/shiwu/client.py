"""The producer's client: enqueue, wait, results, queue state."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Self
from uuid import uuid4

import redis

from shiwu.contract import (
    CLAIMS,
    DEAD,
    DELAYED,
    WORKERS,
    Lane,
    Request,
    check_id,
    parse_request,
    result_key,
)
from shiwu.errors import QueueFull, WaitTimeout
from shiwu.message import build_message
from shiwu.results import StreamItem, TagResult, follow, read_result

CLOCK_S: Final = 60.0
ALIVE_MS: Final = 10_000
_STEPS: Final = (0, 3, 6, 9)


@dataclass(frozen=True, slots=True)
class QueueState:
    """How much waits, how much is being worked on."""

    waiting: dict[Lane, int]
    claimed: dict[Lane, int]
    delayed: int
    dead: int
    workers: tuple[str, ...]
    """Workers that gave a sign of life in the last ten seconds."""


class Client:
    """Enqueues pictures and reads answers. Thread-safe; every wait on Redis is bounded.

    Args:
        redis_url: default `SHIWU_REDIS_URL`, else redis://127.0.0.1:6379/0.
        max_waiting: a lane that holds this many refuses more with QueueFull. Looked up before each portion, so
            several producers at once may pass it by a portion each.
    """

    def __init__(self, redis_url: str | None = None, *, max_waiting: int = 100_000, timeout_s: float = 5.0) -> None:
        url = redis_url or os.environ.get("SHIWU_REDIS_URL") or "redis://127.0.0.1:6379/0"
        self._redis = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, health_check_interval=30
        )
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._offset_ms = 0.0
        self._offset_until_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # -------------------------------------------------------------------------------- asking
    def enqueue(
        self,
        image: str,
        *,
        labels: str | Sequence[str] | None = None,
        top_k: int = 5,
        threshold: float = 0.0,
        head: str | None = None,
        want: Sequence[str] = ("tags",),
        metadata: Any = None,
        lane: Lane | str = Lane.INTERACTIVE,
        expires_s: float | None = None,
        countdown_s: float | None = None,
        priority: int = 0,
        id: str | None = None,
    ) -> str:
        """Enqueue one picture and return the job id.

        The same id may be enqueued again: it is answered once. `expires_s` counts from now, by Redis' clock.

        Raises:
            RequestError: a field breaks the contract; nothing was sent.
            QueueFull: the lane holds its limit.
            redis.RedisError: Redis did not take it; whether it arrived is not known after a time-out.
        """
        fields = {
            "image": image,
            "labels": labels,
            "top_k": top_k,
            "threshold": threshold,
            "head": head,
            "want": want,
            "metadata": metadata,
        }
        sent = self._send([(fields, id)], Lane(lane), expires_s, countdown_s, priority)
        return sent[0]

    def enqueue_many(
        self,
        images: Iterable[str | Mapping[str, Any]],
        *,
        lane: Lane | str = Lane.BULK,
        expires_s: float | None = None,
        priority: int = 0,
        batch_size: int = 500,
        **fields: Any,
    ) -> Iterator[str]:
        """Enqueue many pictures in pipelined portions; yield the ids as their portion has arrived.

        An item is a reference, or a mapping of the request's fields and perhaps `id`; `fields` are defaults for all.
        Nothing is sent until the result is iterated. After an error, what was yielded has been enqueued.
        """
        source = iter(images)
        while portion := list(islice(source, batch_size)):
            asked = []
            for item in portion:
                own = {"image": item} if isinstance(item, str) else dict(item)
                job_id = own.pop("id", None)
                asked.append((fields | own, job_id))
            yield from self._send(asked, Lane(lane), expires_s, None, priority)

    def _send(
        self,
        asked: Sequence[tuple[dict[str, Any], str | None]],
        lane: Lane,
        expires_s: float | None,
        countdown_s: float | None,
        priority: int,
    ) -> list[str]:
        requests: list[tuple[Request, str]] = [
            (parse_request(fields), check_id(job_id or str(uuid4()))) for fields, job_id in asked
        ]
        waiting = self._waiting([lane])[lane]
        if waiting + len(requests) > self._max_waiting:
            raise QueueFull(
                f"expected room for {len(requests)} in lane {lane}, which holds {waiting} of {self._max_waiting}; "
                "try later, or raise max_waiting"
            )
        now_ms = self.server_time_ms()
        messages = [
            build_message(
                request,
                job_id=job_id,
                lane=lane,
                sent_ms=now_ms,
                expires_ms=None if expires_s is None else now_ms + expires_s * 1000,
                eta_ms=None if countdown_s is None else now_ms + countdown_s * 1000,
                priority=priority,
            )
            for request, job_id in requests
        ]
        step = max((i for i, lowest in enumerate(_STEPS) if lowest <= priority), default=0)
        self._redis.lpush(lane.keys[step], *messages)
        return [job_id for _, job_id in requests]

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

    # -------------------------------------------------------------------------------- answers
    def answer(self, job_id: str) -> TagResult | None:
        """The answer if it is there, whatever its status."""
        raw: Any = self._redis.get(result_key(job_id))
        return None if raw is None else read_result(raw)

    def wait(self, job_id: str, *, timeout_s: float) -> TagResult:
        """Wait for the answer, whatever its status; `raise_for_status()` tells tagged from the rest.

        Raises:
            WaitTimeout: there is none yet; the job goes on.
        """
        return self.wait_many([job_id], timeout_s=timeout_s)[job_id]

    def wait_many(self, job_ids: Iterable[str], *, timeout_s: float) -> dict[str, TagResult]:
        """Wait for all of these answers, in the order asked.

        Raises:
            WaitTimeout: says how many are missing.
        """
        ids = list(dict.fromkeys(job_ids))
        found = dict(self.as_answered(ids, timeout_s=timeout_s))
        if missing := [job_id for job_id in ids if job_id not in found]:
            raise WaitTimeout(
                f"expected {len(ids)} answers within {timeout_s:g} s, {len(missing)} are missing, first {missing[0]}"
            )
        return {job_id: found[job_id] for job_id in ids}

    def as_answered(self, job_ids: Iterable[str], *, timeout_s: float) -> Iterator[tuple[str, TagResult]]:
        """Yield (id, answer) as they come; end when all have come or the time is over."""
        missing = dict.fromkeys(job_ids)
        deadline_s = time.monotonic() + timeout_s
        with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]  # redis' own
            # Subscribe first and look afterwards: an answer between the two is then seen at least once.
            for portion in _portions(list(missing), 1000):
                pubsub.subscribe(*[result_key(job_id) for job_id in portion])
            for portion in _portions(list(missing), 500):
                replies: Any = self._redis.mget([result_key(job_id) for job_id in portion])
                for job_id, raw in zip(portion, replies, strict=True):
                    if raw is not None:
                        del missing[job_id]
                        yield job_id, read_result(raw)
            while missing and (left_s := deadline_s - time.monotonic()) > 0:
                message = pubsub.get_message(timeout=min(left_s, self._timeout_s / 2))
                if message is not None:
                    result = read_result(message["data"])
                    if result.id in missing:
                        del missing[result.id]
                        yield result.id, result

    def tag(self, image: str, *, timeout_s: float = 60.0, **fields: Any) -> TagResult:
        """Enqueue one picture and wait for its tags.

        Raises:
            JobFailed: it ended without tags.
            WaitTimeout: no answer in time.
        """
        return self.wait(self.enqueue(image, **fields), timeout_s=timeout_s).raise_for_status()

    def results(
        self,
        *,
        group: str,
        consumer: str | None = None,
        batch: int = 100,
        block_s: float = 2.0,
        reclaim_idle_s: float = 60.0,
        stop_when_idle: bool = False,
    ) -> Iterator[StreamItem]:
        """Yield every answer of the stream to one consumer of the group; call `.ack()` on each when it took effect.

        What a consumer held for `reclaim_idle_s` without acknowledging goes to another: an answer may therefore come
        twice, with the same id. A group sees the stream from its beginning.
        """
        return follow(
            self._redis,
            group=group,
            consumer=consumer or f"{socket.gethostname()}-{os.getpid()}",
            batch=batch,
            block_s=min(block_s, self._timeout_s / 2),
            reclaim_idle_s=reclaim_idle_s,
            stop_when_idle=stop_when_idle,
        )

    # -------------------------------------------------------------------------------- queues
    def queue_state(self) -> QueueState:
        """What waits and what is claimed, lane by lane."""
        waiting = self._waiting(list(Lane))
        claimed = dict.fromkeys(Lane, 0)
        for _, record in self._redis.hscan_iter(CLAIMS, count=1000):
            key = record.split(b"|", 3)[2].decode()
            claimed[next((lane for lane in Lane if key in lane.keys), Lane.BULK)] += 1
        seconds, micros = self._redis.time()
        alive: Any = self._redis.zrangebyscore(WORKERS, seconds * 1000 + micros / 1000 - ALIVE_MS, "+inf")
        return QueueState(
            waiting=waiting,
            claimed=claimed,
            delayed=int(self._redis.zcard(DELAYED)),
            dead=int(self._redis.xlen(DEAD)),
            workers=tuple(name.decode() for name in alive),
        )

    def _waiting(self, lanes: Sequence[Lane]) -> dict[Lane, int]:
        with self._redis.pipeline(transaction=False) as pipe:
            for lane in lanes:
                for key in lane.keys:
                    pipe.llen(key)
            lengths = pipe.execute()
        return {lane: sum(lengths[i * 4 : i * 4 + 4]) for i, lane in enumerate(lanes)}


def _portions(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
