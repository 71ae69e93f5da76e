"""The client: enqueue, wait, cancel, results stream, dead letters, queue state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, tzinfo
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

from shiwu.broker.known_labels import KnownLabels
from shiwu.broker.maintenance import SweepReport
from shiwu.broker.queue_stats import QueueState
from shiwu.broker.sharding import PoolOptions, open_shards
from shiwu.broker.steps import Steps, iterate, run
from shiwu.broker.stray_lanes import StrayLanes, find_stray_lanes
from shiwu.client.arguments import read_id, read_seconds, read_type, refused
from shiwu.client.calls import MAX_CONNECTIONS, Calls, ClientOptions, read_waited_ids
from shiwu.client.dead_letters import DeadFilter, DeadLetter
from shiwu.client.items import check_images
from shiwu.client.job_report import JobReport
from shiwu.client.results import TagResult
from shiwu.client.sender import SendOptions, read_lane
from shiwu.client.shard_states import ShardState, read_shards
from shiwu.client.shard_stream import follow
from shiwu.client.shard_waiter import as_answered_in_shards
from shiwu.client.stream import read_options
from shiwu.client.stream_items import StreamItem, UnreadableItem, log_unreadable, shard_of_entry
from shiwu.client.sweeping import Sweeper
from shiwu.client.waiter import collect
from shiwu.contract import Lane

T = TypeVar("T")


class Client:
    """Enqueues images and reads answers. Any number of threads may share one client.

    The constructor does not connect. Every wait on Redis is limited, and every method may raise `redis.RedisError`.
    Waits for answers go on while Redis is unavailable, and raise only errors that time cannot cure, such as a wrong
    password. Use the client as a context manager, or call `close`.

        with Client() as client:
            job_id = client.enqueue("s3://images/cat.jpg", labels=["cat", "dog"])
            print(client.wait(job_id, timeout_s=30).best)

    Args:
        redis_url: `redis://`, `rediss://`, `valkey://`, `valkeys://`, `unix:///path`, `cluster://host:port/?shards=16`
            or `sentinel://host:port,host:port/name/0`. Default: `SHIWU_REDIS_URL`, or redis://127.0.0.1:6379/0.
        max_waiting: how many messages a lane may hold; further ones are refused with QueueFull. It is checked before
            each portion, so several producers together may exceed it by one portion each. Each shard of a cluster may
            hold an equal part.
        timeout_s: how long one Redis command may take, in seconds. A wait for answers may end this much later than
            requested.
        max_connections: how many connections to open at most to each shard: this many for commands, this many for
            reading answers, and this many that listen for answers. Threads beyond this number wait up to `timeout_s`
            for a connection, or poll for their answers instead of listening.

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
        limits = PoolOptions(timeout_s=options.timeout_s, max_connections=options.max_connections)
        self._redis = open_shards(options.redis_url, replace(limits, retries=3))
        # Waits retry by themselves. Retries below them would exceed their time-out where Redis hangs.
        self._no_retry = open_shards(options.redis_url, limits)
        self._listener = open_shards(options.redis_url, replace(limits, pool_wait_s=0.0))
        self._calls = Calls(options)
        self._timeout_s = options.timeout_s
        self.unreadable_items = 0
        """How many entries of the results stream `results` has skipped because this version cannot read them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Answers of enqueued jobs can be read by another client."""
        for client in (*self._redis, *self._no_retry, *self._listener):
            client.close()

    def enqueue(
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

        An id that is enqueued again is answered once only. Durations are in seconds from now, by Redis' clock.

        Args:
            image: `s3://bucket/key`, `https://…`, `http://…` or `file:///…`; the worker must be allowed to read it.
            labels: the name of a label set on the workers, or 1 to 1000 different labels of 1 to 100 characters.
                Default: the workers' default label set.
            top_k: how many tags to return at most, 1 to 1000; the best come first.
            threshold: lowest `p`, or score, of a tag, 0 to 1; 0 or "set": the limits of the label set.
            min_cosine: lowest cosine of a tag, -1 to 1. Default: the limits of the label set.
            head: "softmax" (all scores sum to 1) or "sigmoid" (independent scores). Default: the label set's.
            want: what to return: "tags", "embedding" (the unit vector as numbers), "vector" (as float16 in base64).
            metadata: any JSON value of up to 4096 bytes; returned in the answer.
            callback: the webhook that gets the answer: the name of an endpoint, or an https URL.
            lane: "interactive", which has priority, or "bulk".
            expires_s: a job that has not started by then is answered `expired` once a worker or `shiwu sweep` finds it.
            answer_by_s: by then the job has an answer, `expired` if no other. Needs a running worker or `shiwu sweep`.
            countdown_s: no worker starts the job earlier; must be shorter than the two durations above.
            priority: 0 to 9 within the lane, 0 first, as in Celery on Redis. Redis has four steps: 0, 3, 6 and 9.
            replicas: how many replicas of Redis must confirm the job before this returns.
            id: a job id of 1 to 255 bytes in UTF-8. Default: a random UUID.
            coalesce: derive the id by `job_id_for`, so that a question is answered once for all. Allows no durations.

        Raises:
            RequestError: an argument is invalid or would have no effect; nothing was sent.
            QueueFull: the lane holds its limit; nothing was sent.
            NotReplicated: the job is enqueued, but too few replicas confirmed it; enqueue the same id again.
            redis.RedisError: after a time-out the job may be enqueued; enqueue the same id again.
        """
        fields: dict[str, Any] = {"image": image, "labels": labels, "top_k": top_k, "threshold": threshold}
        fields |= {"min_cosine": min_cosine, "head": head, "want": want, "metadata": metadata, "callback": callback}
        options = SendOptions(read_lane(lane), expires_s, answer_by_s, countdown_s, priority, replicas)
        return self._run(self._calls.enqueue_steps(fields, options, job_id=id, coalesce=coalesce))

    def enqueue_many(
        self,
        images: Iterable[str | Mapping[str, Any]],
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
    ) -> Iterator[str]:
        """Enqueue many images in portions; yield the job ids of each portion once it is enqueued.

        Nothing is sent until you iterate over the result. After an error, all jobs whose ids were yielded are enqueued.

        Args:
            images: references, or mappings with `image`, other fields and optionally `id`; read portion by portion.
            lane, expires_s, answer_by_s, countdown_s, priority, replicas: as for `enqueue`, for all images. Durations
                count from the sending of the portion.
            batch_size: images in a portion, which is sent in one step.
            max_waiting: how many messages the lane may hold. Default: that of the client.
            wait_s: how long each portion may wait for space in the lane or for Redis, in seconds; may be `math.inf`.
                The logger `shiwu` reports it.
            id_from: "reference" derives missing ids from the reference, labels and options, so that a second call with
                the same images adds no jobs while the ids count as answered.
            coalesce: as for `enqueue`, for images without an id of their own.
            fields: `labels`, `top_k`, `threshold`, `min_cosine`, `head`, `want`, `metadata` and `callback` for all
                images that do not have their own.

        Raises:
            TypeError: an argument is unknown, or `images` is a single reference.
            RequestError: an argument is invalid; or, during the iteration, an item is.
            QueueFull, NotReplicated, redis.RedisError: as for `enqueue`, about one portion, after `wait_s`.
        """
        check_images(images)
        options = SendOptions(
            read_lane(lane), expires_s, answer_by_s, countdown_s, priority, replicas, max_waiting, wait_s
        )
        portions = self._calls.portions(fields, options, batch_size=batch_size, id_from=id_from, coalesce=coalesce)
        return portions.send(images, self._run)

    def cancel(self, job_ids: str | Iterable[str], *, reason: str = "") -> list[str]:
        """Answer jobs `cancelled` now; return the ids that had no answer before.

        A waiting job never starts. A job that a worker holds is dropped before it is encoded, or its tags are
        discarded. An id that was never enqueued is answered too, and counts as answered when it is enqueued later.

        Args:
            reason: the error in the answer quotes its first 200 characters.

        Raises:
            RequestError: an id is invalid; nothing was cancelled.
            redis.RedisError: some jobs may be cancelled; cancelling again is safe.
        """
        return self._run(self._calls.cancel_steps(job_ids, reason=reason))

    def server_time_ms(self) -> float:
        """Redis' clock in ms since 1970, which all clients and workers share. Asks Redis at most once a minute."""
        return self._run(self._calls.time_steps())

    def answer(self, job_id: str) -> TagResult | None:
        """The answer of a job, whatever its status; None while there is none. Does not wait.

        Answers are kept for a day by default (`SHIWU_RESULT_TTL_S` of the workers).

        Raises:
            ForeignResult: another Celery task has this id.
        """
        return self._run(self._calls.answer_steps(job_id))

    def wait(self, job_id: str, *, timeout_s: float) -> TagResult:
        """Wait for the answer of a job and return it, whatever its status: check `ok`, or use `raise_for_status`.

        Args:
            timeout_s: how long to wait, in seconds; 0 checks once.

        Raises:
            WaitTimeout: there is no answer yet; the job goes on.
            ForeignResult: another Celery task has this id.
        """
        return self.wait_many([read_id(job_id)], timeout_s=timeout_s)[job_id]

    def wait_many(self, job_ids: str | Iterable[str], *, timeout_s: float) -> dict[str, TagResult]:
        """Wait for the answers of several jobs; return id → answer, in the order of the ids.

        Args:
            timeout_s: how long to wait for all of them together, in seconds.

        Raises:
            WaitTimeout: some answers are missing; the text says how many. Use `as_answered` to get those that came.
            ForeignResult: another Celery task has one of the ids.
        """
        ids = read_waited_ids(job_ids)
        return collect(self.as_answered(ids, timeout_s=timeout_s), ids, timeout_s=timeout_s)

    def as_answered(self, job_ids: str | Iterable[str], *, timeout_s: float) -> Iterator[tuple[str, TagResult]]:
        """Yield (id, answer) in the order in which answers come; end after the last one or after `timeout_s`.

        A time-out raises no error: ids without an answer are just not yielded. The arguments and other errors are those
        of `wait_many`.
        """
        ids = read_waited_ids(job_ids)
        read_seconds("timeout_s", timeout_s)
        run(self._no_retry, self._calls.count_steps())
        return as_answered_in_shards(self._no_retry, self._listener, ids, timeout_s=timeout_s)

    def tag(self, image: str, *, timeout_s: float = 60.0, **fields: Any) -> TagResult:
        """Enqueue one image, wait for its answer, and return it if the image was tagged.

        The wait takes up to `timeout_s` seconds; `fields` are arguments of `enqueue`.

        Raises:
            JobFailed: the job ended without tags; its attribute `answer` has the reason.
            WaitTimeout: there is no answer yet; the job goes on.
            RequestError, QueueFull: nothing was sent, as for `enqueue`.
        """
        read_seconds("timeout_s", timeout_s)
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
        away_s: float | None = None,
        on_unreadable: Callable[[UnreadableItem], None] = log_unreadable,
    ) -> Iterator[StreamItem]:
        """Yield the answers of all jobs, each to one consumer of the group. Blocks while there are none.

        Call `ack()` on each item once its work is done. An item that is not acknowledged within `reclaim_idle_s` goes
        to another consumer, so an answer may come twice, with the same id. A new group starts at the beginning of the
        stream. Use each iterator in one thread only.

            for item in client.results(group="archive"):
                store(item.result)
                item.ack()

        Args:
            group: name of the consumer group. Each group gets every answer.
            consumer: a name that no other loop uses at the same time. A loop with the name of a crashed one gets its
                unacknowledged answers immediately. Default: a new name, which is removed at the end of the loop.
            batch: how many answers to read in one round trip.
            block_s: seconds that one read waits for answers, at most half of the client's `timeout_s`; 0 never pauses.
            reclaim_idle_s: in seconds, longer than the work on one answer; the same for all consumers of a group.
            stop_when_idle: end once all answers are delivered, and those that other consumers held at that time are
                acknowledged or taken over. Default: never end.
            away_s: how long Redis may be unavailable, in seconds, before its error is raised; None: forever.
            on_unreadable: called once for each entry that this version of the client cannot read. Default: log a
                warning to the logger `shiwu`. The entry is skipped, counted in `unreadable_items`, and stays pending.

        Raises:
            RequestError: an argument is invalid.
            redis.RedisError: Redis was unavailable for `away_s`, or waiting cannot cure the error.
        """

        def report(entry_id: str, fields: Mapping[bytes, bytes], reason: str) -> None:
            self.unreadable_items += 1
            on_unreadable(UnreadableItem(entry_id, fields, reason, self._redis[shard_of_entry(entry_id)], group))

        if not callable(on_unreadable):
            raise refused("on_unreadable", "a function that takes an UnreadableItem", on_unreadable)
        options = read_options(
            group=group,
            consumer=consumer,
            batch=batch,
            block_s=block_s,
            max_block_s=self._timeout_s / 2,
            reclaim_idle_s=reclaim_idle_s,
            stop_when_idle=stop_when_idle,
            away_s=away_s,
            on_unreadable=report,
        )
        return follow(self._no_retry, self._redis, options)

    def dead_letters(self, where: DeadFilter | None = None, *, limit: int | None = None) -> Iterator[DeadLetter]:
        """Yield up to `limit` jobs that ended without tags, newest first, each with its message and answer."""
        return iterate(self._redis, self._calls.dead_letters(where, limit=limit).next_steps)

    def dead_letter(self, job_id: str) -> DeadLetter | None:
        """The dead letter of a job, or None where there is none."""
        return self._run(self._calls.dead_letter_steps(job_id))

    def requeue(self, job_ids: str | Iterable[str]) -> list[str]:
        """Put dead letters back into their lane with the same ids; return the ids of those that were requeued.

        Attempts start at one again. The old answer is removed, so a wait for the id waits for the new answer, and the
        results stream gets a second entry.
        """
        return self._run(self._calls.requeue_steps(job_ids))

    def drop(self, job_ids: str | Iterable[str]) -> int:
        """Delete dead letters; return how many were deleted. Their answers are kept as long as others."""
        return self._run(self._calls.drop_steps(job_ids))

    def sweep(self, *, zone: tzinfo = UTC) -> SweepReport:
        """Do maintenance once, for places where no worker may be running; see the command `shiwu sweep`.

        Requeues jobs whose lease expired, answers late ones and trims the results stream. Several may run side by side.

        Args:
            zone: time zone of an `expires` without one, as the workers' `SHIWU_TIMEZONE`.
        """
        read_type("zone", zone, tzinfo, "a tzinfo as ZoneInfo('Asia/Shanghai')")
        return self._sweeper.sweep(zone=zone)

    def queue_state(self) -> QueueState:
        """Count waiting, claimed and delayed jobs, dead letters and running workers; several round trips."""
        return self._run(self._calls.state_steps())

    def shard_states(self) -> tuple[ShardState, ...]:
        """As `queue_state`, of each shard; one that is unavailable has the error instead of its state."""
        return read_shards(self._no_retry)

    def explain(self, job_id: str) -> JobReport:
        """Find out where a job is and why; for operators, because it reads lanes, claims and answers.

        Searches up to 20,000 messages of each lane where the id is not found otherwise. The job may move meanwhile.
        """
        return self._run(self._calls.explain_steps(job_id))

    def running_workers(self) -> tuple[str, ...]:
        """Names of workers with a heartbeat in the last ten seconds; needs fewer rights than `queue_state`."""
        return self._run(self._calls.workers_steps())

    def known_labels(self, digest: str) -> KnownLabels | None:
        """The label set behind `labels.digest` of an answer, or None where no worker has stored it, or not lately."""
        return self._run(self._calls.labels_steps(digest))

    def stray_lanes(self) -> StrayLanes:
        """Find lists that look like lanes and that no worker reads; searches up to two seconds. See docs/clients.md."""
        return find_stray_lanes(self._redis[0]) if len(self._redis) == 1 else StrayLanes(is_complete=False)

    @cached_property
    def _sweeper(self) -> Sweeper:
        return Sweeper(self._redis)

    def _run(self, steps: Steps[T]) -> T:
        run(self._redis, self._calls.count_steps())
        return run(self._redis, steps)
