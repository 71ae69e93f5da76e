"""The asyncio client: the methods of `shiwu.Client`, as coroutines and asynchronous iterators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, tzinfo
from typing import Any, Literal, Self, TypeVar

from shiwu.aio.connection import close, connect
from shiwu.aio.items import StreamItem, UnreadableItem
from shiwu.aio.run_steps import iterate, run
from shiwu.aio.waiter import Waiter
from shiwu.broker.known_labels import KnownLabels
from shiwu.broker.maintenance import SweepReport
from shiwu.broker.queue_stats import QueueState
from shiwu.broker.steps import Steps
from shiwu.broker.stray_lanes import StrayLanes
from shiwu.client import Client as BlockingClient
from shiwu.client.arguments import read_id, read_seconds, read_type, refused
from shiwu.client.calls import MAX_CONNECTIONS, Calls, ClientOptions, Portions, read_waited_ids
from shiwu.client.dead_letters import DeadFilter, DeadLetter
from shiwu.client.items import check_images
from shiwu.client.job_report import JobReport
from shiwu.client.results import TagResult
from shiwu.client.sender import SendOptions, read_lane
from shiwu.client.shard_states import ShardState
from shiwu.client.shard_stream import make_loop
from shiwu.client.stream import StreamOptions, read_options
from shiwu.client.stream_items import log_unreadable, shard_of_entry
from shiwu.client.waiter import collect
from shiwu.contract import Lane

T = TypeVar("T")
Image = str | Mapping[str, Any]


class Client:
    """Enqueues images and reads answers. Any number of tasks of one event loop may share one client.

    Methods have the arguments, results and errors of the same methods of `shiwu.Client`, where they are explained; this
    class says what differs. Durations are in seconds. A method that is cancelled leaves no task and no subscription
    behind; a message that it was sending may be enqueued.

    The constructor does not connect. Use the client as an asynchronous context manager, or await `aclose`.

        async with Client() as client:
            job_id = await client.enqueue("s3://images/cat.jpg", labels=["cat", "dog"])
            print((await client.wait(job_id, timeout_s=30)).best)

    Args:
        redis_url, max_waiting, timeout_s: as for `shiwu.Client`.
        max_connections: how many connections to open at most to each shard: this many for commands, and this many for
            reading answers. One further connection listens for the answers of all waits. Tasks beyond this number wait
            up to `timeout_s` for a connection.

    Raises:
        RedisUrlError: the URL is invalid.
        RequestError: another argument is invalid.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        max_waiting: int = 100_000,
        timeout_s: float = 5.0,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        options = ClientOptions.read(
            redis_url, max_waiting=max_waiting, timeout_s=timeout_s, max_connections=max_connections
        )
        limits: dict[str, Any] = {"timeout_s": options.timeout_s, "max_connections": options.max_connections}
        self._redis = connect(options.redis_url, retries=3, **limits)
        # Waits retry by themselves. Retries below them would exceed their time-out where Redis hangs.
        self._no_retry = connect(options.redis_url, **limits)
        self._listener = connect(
            options.redis_url, timeout_s=options.timeout_s, max_connections=1, has_health_check=False
        )
        self._waiter = Waiter(self._no_retry, self._listener, timeout_s=options.timeout_s)
        # Connects only for maintenance, which runs in threads.
        self._blocking = BlockingClient(options.redis_url, timeout_s=options.timeout_s)
        self._calls = Calls(options)
        self._options = options
        self.unreadable_items = 0
        """How many entries of the results stream `results` has skipped because this version cannot read them."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Waits that are under way raise redis.ConnectionError."""
        await self._waiter.aclose()
        for client in (*self._redis, *self._no_retry, *self._listener):
            await close(client)
        self._blocking.close()

    async def enqueue(
        self,
        image: str,
        *,
        labels: str | Sequence[str] | None = None,
        top_k: int = 5,
        threshold: float | Literal["set"] = 0.0,
        min_cosine: float | None = None,
        head: str | None = None,
        want: Sequence[str] = ("tags",),
        metadata: Any = None,
        callback: str | None = None,
        lane: Lane | str = Lane.INTERACTIVE,
        expires_s: float | None = None,
        answer_by_s: float | None = None,
        countdown_s: float | None = None,
        priority: int = 0,
        replicas: int = 0,
        id: str | None = None,
        coalesce: bool = False,
    ) -> str:
        """Enqueue one image and return its job id. Does not wait for the answer.

        Raises:
            RequestError: an argument is invalid or would have no effect; nothing was sent.
            QueueFull: the lane holds its limit; nothing was sent.
            NotReplicated: the job is enqueued, but too few replicas confirmed it; enqueue the same id again.
            redis.RedisError: after a time-out the job may be enqueued; enqueue the same id again.
        """
        fields: dict[str, Any] = {"image": image, "labels": labels, "top_k": top_k, "threshold": threshold}
        fields |= {"min_cosine": min_cosine, "head": head, "want": want, "metadata": metadata, "callback": callback}
        options = SendOptions(read_lane(lane), expires_s, answer_by_s, countdown_s, priority, replicas)
        return await self._run(self._calls.enqueue_steps(fields, options, job_id=id, coalesce=coalesce))

    def enqueue_many(
        self,
        images: Iterable[Image] | AsyncIterable[Image],
        *,
        lane: Lane | str = Lane.BULK,
        expires_s: float | None = None,
        answer_by_s: float | None = None,
        countdown_s: float | None = None,
        priority: int = 0,
        replicas: int = 0,
        batch_size: int = 500,
        max_waiting: int | None = None,
        wait_s: float = 0.0,
        id_from: Literal["reference"] | None = None,
        coalesce: bool = False,
        **fields: Any,
    ) -> AsyncGenerator[str, None]:
        """Enqueue many images in portions; yield the job ids of each portion once it is enqueued.

        Nothing is sent until you iterate over the result. After an error, all jobs whose ids were yielded are enqueued.

        Args:
            images: references, or mappings with `image` and other fields; also an asynchronous iterable. An iterable
                that blocks, as one that reads a file, blocks the event loop.

        Raises:
            TypeError: an argument is unknown, or `images` is a single reference.
            RequestError: an argument is invalid; or, during the iteration, an item is.
            QueueFull, NotReplicated, redis.RedisError: as for `enqueue`, about one portion, after `wait_s`.
        """
        if not isinstance(images, AsyncIterable):
            check_images(images)
        options = SendOptions(
            read_lane(lane), expires_s, answer_by_s, countdown_s, priority, replicas, max_waiting, wait_s
        )
        portions = self._calls.portions(fields, options, batch_size=batch_size, id_from=id_from, coalesce=coalesce)
        return self._send(images, portions)

    async def cancel(self, job_ids: str | Iterable[str], *, reason: str = "") -> list[str]:
        """Answer jobs `cancelled` now; return the ids that had no answer before."""
        return await self._run(self._calls.cancel_steps(job_ids, reason=reason))

    async def server_time_ms(self) -> float:
        """Redis' clock in ms since 1970, which all clients and workers share. Asks Redis at most once a minute."""
        return await self._run(self._calls.time_steps())

    async def answer(self, job_id: str) -> TagResult | None:
        """The answer of a job, whatever its status; None while there is none. Does not wait."""
        return await self._run(self._calls.answer_steps(job_id))

    async def wait(self, job_id: str, *, timeout_s: float) -> TagResult:
        """Wait for the answer of a job, whatever its status, and return it.

        Raises:
            WaitTimeout: there is no answer yet; the job goes on.
            ForeignResult: another Celery task has this id.
        """
        return (await self.wait_many([read_id(job_id)], timeout_s=timeout_s))[job_id]

    async def wait_many(self, job_ids: str | Iterable[str], *, timeout_s: float) -> dict[str, TagResult]:
        """Wait for the answers of several jobs; return id → answer, in the order of the ids.

        Raises:
            WaitTimeout: some answers are missing; the text says how many. Use `as_answered` to get those that came.
            ForeignResult: another Celery task has one of the ids.
        """
        ids = read_waited_ids(job_ids)
        read_seconds("timeout_s", timeout_s)
        async with aclosing(self._as_answered(ids, timeout_s=timeout_s)) as answers:
            found = {job_id: answer async for job_id, answer in answers}
        return collect(found.items(), ids, timeout_s=timeout_s)

    def as_answered(
        self, job_ids: str | Iterable[str], *, timeout_s: float
    ) -> AsyncGenerator[tuple[str, TagResult], None]:
        """Yield (id, answer) in the order in which answers come; end after the last one or after `timeout_s`.

        A time-out raises no error: ids without an answer are just not yielded. A loop that leaves early should close
        the iterator, as by `contextlib.aclosing`; otherwise its subscriptions end when Python collects it.
        """
        ids = read_waited_ids(job_ids)
        read_seconds("timeout_s", timeout_s)
        return self._as_answered(ids, timeout_s=timeout_s)

    async def tag(self, image: str, *, timeout_s: float = 60.0, **fields: Any) -> TagResult:
        """Enqueue one image, wait for its answer, and return it if the image was tagged.

        Raises:
            JobFailed: the job ended without tags; its attribute `answer` has the reason.
            WaitTimeout: there is no answer yet; the job goes on.
            RequestError, QueueFull: nothing was sent, as for `enqueue`.
        """
        read_seconds("timeout_s", timeout_s)
        job_id = await self.enqueue(image, **fields)
        return (await self.wait(job_id, timeout_s=timeout_s)).raise_for_status()

    def results(
        self,
        *,
        group: str,
        consumer: str | None = None,
        batch: int = 100,
        block_s: float = 2.0,
        reclaim_idle_s: float = 60.0,
        stop_when_idle: bool = False,
        away_s: float | None = None,
        on_unreadable: Callable[[UnreadableItem], None] = log_unreadable,
    ) -> AsyncGenerator[StreamItem, None]:
        """Yield the answers of all jobs, each to one consumer of the group. Waits while there are none.

        Await `ack()` on each item once its work is done. Use each iterator in one task only. A loop that leaves early
        should close the iterator, as by `contextlib.aclosing`, so that other consumers get its answers immediately.

        Raises:
            RequestError: an argument is invalid.
            redis.RedisError: Redis was unavailable for `away_s`, or waiting cannot cure the error.
        """
        if not callable(on_unreadable):
            raise refused("on_unreadable", "a function that takes an UnreadableItem", on_unreadable)

        def report(entry_id: str, fields: Mapping[bytes, bytes], reason: str) -> None:
            self.unreadable_items += 1
            client = self._redis[shard_of_entry(entry_id)]
            on_unreadable(UnreadableItem(entry_id, fields, reason, client, group))

        options = read_options(
            group=group,
            consumer=consumer,
            batch=batch,
            block_s=block_s,
            max_block_s=self._options.timeout_s / 2,
            reclaim_idle_s=reclaim_idle_s,
            stop_when_idle=stop_when_idle,
            away_s=away_s,
            on_unreadable=report,
        )
        return self._follow(options)

    def dead_letters(
        self, where: DeadFilter | None = None, *, limit: int | None = None
    ) -> AsyncGenerator[DeadLetter, None]:
        """Yield up to `limit` jobs that ended without tags, newest first, each with its message and answer."""
        return iterate(self._redis, self._calls.dead_letters(where, limit=limit).next_steps)

    async def dead_letter(self, job_id: str) -> DeadLetter | None:
        """The dead letter of a job, or None where there is none."""
        return await self._run(self._calls.dead_letter_steps(job_id))

    async def requeue(self, job_ids: str | Iterable[str]) -> list[str]:
        """Put dead letters back into their lane with the same ids; return the ids of those that were requeued."""
        return await self._run(self._calls.requeue_steps(job_ids))

    async def drop(self, job_ids: str | Iterable[str]) -> int:
        """Delete dead letters; return how many were deleted. Their answers are kept as long as others."""
        return await self._run(self._calls.drop_steps(job_ids))

    async def sweep(self, *, zone: tzinfo = UTC) -> SweepReport:
        """Do maintenance once, in a thread with connections of its own, which a cancellation does not end."""
        read_type("zone", zone, tzinfo, "a tzinfo as ZoneInfo('Asia/Shanghai')")
        return await asyncio.to_thread(self._blocking.sweep, zone=zone)

    async def queue_state(self) -> QueueState:
        """Count waiting, claimed and delayed jobs, dead letters and running workers; several round trips."""
        return await self._run(self._calls.state_steps())

    async def shard_states(self) -> tuple[ShardState, ...]:
        """As `queue_state`, of each shard, in a thread with connections of its own."""
        return await asyncio.to_thread(self._blocking.shard_states)

    async def explain(self, job_id: str) -> JobReport:
        """Find out where a job is and why; for operators, because it reads lanes, claims and answers."""
        return await self._run(self._calls.explain_steps(job_id))

    async def running_workers(self) -> tuple[str, ...]:
        """Names of workers with a heartbeat in the last ten seconds; needs fewer rights than `queue_state`."""
        return await self._run(self._calls.workers_steps())

    async def known_labels(self, digest: str) -> KnownLabels | None:
        """The label set behind `labels.digest` of an answer, or None where it is not known."""
        return await self._run(self._calls.labels_steps(digest))

    async def stray_lanes(self) -> StrayLanes:
        """Find lists that look like lanes and that no worker reads, in a thread with connections of its own."""
        return await asyncio.to_thread(self._blocking.stray_lanes)

    # -------------------------------------------------------------------------------- how
    async def _run(self, steps: Steps[T]) -> T:
        await run(self._redis, self._calls.count_steps())
        return await run(self._redis, steps)

    async def _as_answered(
        self, ids: Sequence[str], *, timeout_s: float
    ) -> AsyncGenerator[tuple[str, TagResult], None]:
        await run(self._no_retry, self._calls.count_steps())
        async with aclosing(self._waiter.as_answered(ids, timeout_s=timeout_s)) as answers:
            async for found in answers:
                yield found

    async def _send(
        self, images: Iterable[Image] | AsyncIterable[Image], portions: Portions
    ) -> AsyncGenerator[str, None]:
        async for portion in _portions_of(images, size=portions.size):
            for job_id in await self._run(portions.send_steps(portion)):
                yield job_id

    async def _follow(self, options: StreamOptions) -> AsyncGenerator[StreamItem, None]:
        # The reading client does not retry: a repeated read would deliver other entries.
        loop = make_loop(options, shards=len(self._no_retry))
        try:
            while (entry := await run(self._no_retry, loop.next_steps())) is not None:
                client = self._redis[shard_of_entry(entry.id)]
                yield StreamItem(entry.id, entry.result, client, options.group, entry.generation)
        finally:
            await run(self._no_retry, loop.leave_steps())


async def _portions_of(
    images: Iterable[Image] | AsyncIterable[Image], *, size: int
) -> AsyncGenerator[list[Image], None]:
    """Yield the images in lists of `size`; the last one may be shorter."""
    portion: list[Image] = []
    async for image in _each(images):
        portion.append(image)
        if len(portion) == size:
            yield portion
            portion = []
    if portion:
        yield portion


async def _each(images: Iterable[Image] | AsyncIterable[Image]) -> AsyncGenerator[Image, None]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image
