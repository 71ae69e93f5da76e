"""The producer's client: enqueue, wait, cancel, results, dead letters, queue state."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, tzinfo
from itertools import islice
from typing import Any, Literal, Self
from uuid import uuid4

from shiwu.broker.answers import AnswerStore, cancelled_entry
from shiwu.broker.chunks import chunks
from shiwu.broker.connection import connect
from shiwu.broker.known_labels import KnownLabels, KnownLabelStore
from shiwu.broker.maintenance import Maintenance, SweepReport
from shiwu.broker.queue_stats import QueueState, read_state
from shiwu.broker.retention import PublishedRetention
from shiwu.broker.stray_lanes import StrayLanes, find_stray_lanes
from shiwu.client.arguments import read_id, read_ids, read_seconds, read_text, read_whole, refused
from shiwu.client.dead_letters import DeadFilter, DeadLetter, DeadLetters
from shiwu.client.items import check_images, check_shared_fields, read_item, request_id
from shiwu.client.results import TagResult, read_result
from shiwu.client.sender import Sender, SendOptions, read_lane
from shiwu.client.stream import StreamOptions, follow
from shiwu.client.stream_items import StreamItem, UnreadableItem, log_unreadable
from shiwu.client.waiter import as_answered
from shiwu.contract import (
    Lane,
    Request,
    check_id,
    parse_request,
    result_key,
)
from shiwu.errors import WaitTimeout

DEFAULT_URL = "redis://127.0.0.1:6379/0"
MAX_CONNECTIONS = 64
MAX_URL_CHARS = 10_000
CANCEL_CHUNK_SIZE = 500
MAX_REASON_CHARS = 100_000


class Client:
    """Enqueues pictures and reads answers. Thread-safe; every wait on Redis is bounded.

    Args:
        redis_url: `redis://`, `rediss://`, `valkey://`, `valkeys://`, `unix:///path` or
            `sentinel://host:port,host:port/name/0`; default `SHIWU_REDIS_URL`, else redis://127.0.0.1:6379/0.
        max_waiting: a lane that holds this many refuses more with QueueFull. Looked up before each portion, so
            several producers at once may pass it by a portion each.
        timeout_s: how long one command may take. Waiting for an answer ends at most so much later than asked.
        max_connections: connections for commands, as many again for reading answers, and as many again that listen
            for announced answers. They are opened as threads need them. Any number of threads may share a client:
            those beyond wait for a connection, for `timeout_s` at most, or look for their answers instead of listening.

    Raises:
        RedisUrlError: the URL cannot work.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        max_waiting: int = 100_000,
        timeout_s: float = 5.0,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        url = os.environ.get("SHIWU_REDIS_URL", DEFAULT_URL) if redis_url is None else redis_url
        read_text("redis_url", url, most=MAX_URL_CHARS)
        read_whole("max_waiting", max_waiting, least=1)
        timeout_s = read_seconds("timeout_s", timeout_s, least=0.001)
        max_connections = read_whole("max_connections", max_connections, least=1)
        self._redis = connect(url, timeout_s=timeout_s, retries=3, max_connections=max_connections)
        # Who waits tries again anyhow; further tries beneath would pass its deadline where Redis hangs.
        self._once = connect(url, timeout_s=timeout_s, max_connections=max_connections)
        self._listener = connect(url, timeout_s=timeout_s, max_connections=max_connections, pool_wait_s=0.0)
        self._sender = Sender(self._redis, max_waiting=max_waiting, timeout_s=timeout_s)
        token = f"client.{secrets.token_hex(4)}"
        retention = PublishedRetention(self._redis)
        self._answer_store = AnswerStore(self._redis, token=token, retention=retention)
        self._letters = DeadLetters(self._redis)
        self._maintenance = Maintenance(self._redis, self._answer_store, token=token, retention=retention)
        self._notes = KnownLabelStore(self._redis)
        self._timeout_s = timeout_s
        self.unreadable_items = 0
        """Entries of the results stream that `results` has skipped because this version cannot read them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._once.close()
        self._listener.close()

    # -------------------------------------------------------------------------------- asking
    def enqueue(
        self,
        image: str,
        *,
        labels: str | Sequence[str] | None = None,
        top_k: int = 5,
        threshold: float = 0.0,
        min_cosine: float | None = None,
        head: str | None = None,
        want: Sequence[str] = ("tags",),
        metadata: Any = None,
        lane: Lane | str = Lane.INTERACTIVE,
        expires_s: float | None = None,
        answer_by_s: float | None = None,
        countdown_s: float | None = None,
        priority: int = 0,
        replicas: int = 0,
        id: str | None = None,
    ) -> str:
        """Enqueue one picture and return the job id.

        The same id may be enqueued again: it is answered once. All times count from now, by Redis' clock.

        Args:
            expires_s: work on it is not begun later than this; then it is answered `expired` when it is met.
            answer_by_s: by then there is an answer, `expired` if no other; needs a living worker or `shiwu sweep`.
            countdown_s: work on it is not begun before.
            replicas: how many replicas of Redis must confirm that they have it.

        Raises:
            RequestError: an argument breaks the contract or would have no effect; nothing was sent.
            QueueFull: the lane holds its limit.
            NotReplicated: it is enqueued, but would be lost with the primary now; enqueue the same id again.
            redis.RedisError: Redis did not take it; whether it arrived is not known after a time-out.
        """
        fields = {
            "image": image,
            "labels": labels,
            "top_k": top_k,
            "threshold": threshold,
            "min_cosine": min_cosine,
            "head": head,
            "want": want,
            "metadata": metadata,
        }
        terms = SendOptions(read_lane(lane), expires_s, answer_by_s, countdown_s, priority, replicas)
        return self._send([(fields, id)], terms, make_id=_random_id)[0]

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
        **fields: Any,
    ) -> Iterator[str]:
        """Enqueue many pictures in pipelined portions; yield the ids as their portion has arrived.

        An item is a reference, or a mapping of the request's fields and perhaps `id`; `fields` are defaults for all.
        Nothing is sent until the result is iterated. After an error, what was yielded has been enqueued.

        Args:
            max_waiting: how many messages the lane may hold; default: the client's.
            wait_s: how long each portion may wait for room in the lane, or for Redis to come back; the logger `shiwu`
                tells that it waits. After that QueueFull, or Redis' error, is raised.
            id_from: "reference" makes the ids of items without one from the reference and what is asked about it, so
                that a second call with the same items adds no jobs while the ids count as answered.

        Raises:
            TypeError: an argument is unknown, or `images` is a single reference.
            RequestError: an argument, or later a field of an item, breaks the contract or would have no effect.
        """
        check_images(images)
        check_shared_fields(fields)
        read_whole("batch_size", batch_size, least=1)
        if id_from is not None and id_from != "reference":
            raise refused("id_from", "'reference' or None", id_from)
        terms = SendOptions(
            read_lane(lane), expires_s, answer_by_s, countdown_s, priority, replicas, max_waiting, wait_s
        )
        make_id = request_id if id_from else _random_id
        size = min(batch_size, self._sender.room(terms))
        return self._enqueue_portions(iter(images), fields, terms, batch_size=size, make_id=make_id)

    def _enqueue_portions(
        self,
        source: Iterator[str | Mapping[str, Any]],
        shared: Mapping[str, Any],
        terms: SendOptions,
        *,
        batch_size: int,
        make_id: Callable[[Request], str],
    ) -> Iterator[str]:
        while portion := list(islice(source, batch_size)):
            yield from self._send([read_item(item, shared) for item in portion], terms, make_id=make_id)

    def _send(
        self,
        asked: Sequence[tuple[dict[str, Any], str | None]],
        terms: SendOptions,
        *,
        make_id: Callable[[Request], str],
    ) -> list[str]:
        requests = [(parse_request(fields), job_id) for fields, job_id in asked]
        jobs = [(request, check_id(make_id(request) if job_id is None else job_id)) for request, job_id in requests]
        return self._sender.send(jobs, terms)

    def cancel(self, job_ids: str | Iterable[str], *, reason: str = "") -> list[str]:
        """Answer jobs `cancelled` now; return the ids that had no answer before.

        A job that waits is never worked on; one that a worker holds is left before it is encoded, or its tags are
        discarded. An id that was never enqueued is answered too, and stays so when it is enqueued later.
        """
        ids = [check_id(job_id) for job_id in read_ids("job_ids", job_ids)]
        read_text("reason", reason, most=MAX_REASON_CHARS)
        cancelled: list[str] = []
        for portion in chunks(ids, CANCEL_CHUNK_SIZE):
            now_ms = self.server_time_ms()
            entries = [cancelled_entry(job_id, reason, now_ms=now_ms) for job_id in portion]
            again = self._answer_store.write(entries, token=f"cancel.{secrets.token_hex(4)}")
            cancelled += [job_id for job_id in portion if job_id not in again]
        return cancelled

    def server_time_ms(self) -> float:
        """Redis' clock, in ms since 1970: the only one that all sides share. Looked up once a minute."""
        return self._sender.server_time_ms()

    # -------------------------------------------------------------------------------- answers
    def answer(self, job_id: str) -> TagResult | None:
        """The answer if it is there, whatever its status."""
        raw: Any = self._redis.get(result_key(read_id(job_id)))
        return None if raw is None else read_result(raw)

    def wait(self, job_id: str, *, timeout_s: float) -> TagResult:
        """Wait for the answer, whatever its status; `raise_for_status()` tells tagged from the rest.

        Raises:
            WaitTimeout: there is none yet; the job goes on.
        """
        return self.wait_many([read_id(job_id)], timeout_s=timeout_s)[job_id]

    def wait_many(self, job_ids: str | Iterable[str], *, timeout_s: float) -> dict[str, TagResult]:
        """Wait for all of these answers, in the order asked.

        Raises:
            WaitTimeout: says how many are missing.
        """
        ids = list(dict.fromkeys(read_ids("job_ids", job_ids)))
        found = dict(self.as_answered(ids, timeout_s=timeout_s))
        if missing := [job_id for job_id in ids if job_id not in found]:
            raise WaitTimeout(
                f"expected {len(ids)} answers within {timeout_s:g} s, {len(missing)} are missing, first {missing[0]}"
            )
        return {job_id: found[job_id] for job_id in ids}

    def as_answered(self, job_ids: str | Iterable[str], *, timeout_s: float) -> Iterator[tuple[str, TagResult]]:
        """Yield (id, answer) as they come; end when all have come or the time is over.

        While Redis is away it goes on waiting; what was announced meanwhile is found under its key.
        """
        ids = list(dict.fromkeys(read_ids("job_ids", job_ids)))
        read_seconds("timeout_s", timeout_s)
        return as_answered(self._once, self._listener, ids, timeout_s=timeout_s)

    def tag(self, image: str, *, timeout_s: float = 60.0, **fields: Any) -> TagResult:
        """Enqueue one picture and wait for its tags.

        Raises:
            JobFailed: it ended without tags.
            WaitTimeout: no answer in time.
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
        """Yield every answer of the stream to one consumer of the group; call `.ack()` on each when it took effect.

        Each answer goes to one consumer of the group. What a consumer was given and has not acknowledged after
        `reclaim_idle_s` goes to another, so an answer may come twice, with the same id. A group sees the stream from
        its beginning; one that was deleted is made anew.

        Args:
            consumer: a name that no other loop uses at the same time. A loop that begins with the name of one that
                crashed gets its unacknowledged answers immediately. Default: a new name for each loop, which is removed
                at the end of the loop; then such answers come after `reclaim_idle_s`.
            reclaim_idle_s: longer than the work on one answer takes, and the same for all consumers of the group.
            stop_when_idle: end when all answers were delivered, and those that other consumers held when this one had
                nothing more to read are acknowledged or were taken over.
            away_s: how long Redis may be away before its error is raised; None: wait for ever. The logger `shiwu` tells
                that it is away.
            on_unreadable: called once with each entry that this version of the client cannot read; the default writes
                a warning to the logger `shiwu`. The entry is skipped, counted in `unreadable_items`, and stays pending.
        """

        if not callable(on_unreadable):
            raise refused("on_unreadable", "a function that takes an UnreadableItem", on_unreadable)

        def count(item: UnreadableItem) -> None:
            self.unreadable_items += 1
            on_unreadable(item)

        own_name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        name = own_name if consumer is None else read_text("consumer", consumer, least=1)
        options = StreamOptions(
            group=read_text("group", group, least=1),
            consumer=name,
            is_temporary=consumer is None,
            batch=read_whole("batch", batch, least=1),
            block_s=min(read_seconds("block_s", block_s), self._timeout_s / 2),
            reclaim_idle_s=read_seconds("reclaim_idle_s", reclaim_idle_s),
            stop_when_idle=stop_when_idle,
            away_s=None if away_s is None else read_seconds("away_s", away_s),
            on_unreadable=count,
        )
        return follow(self._once, self._redis, options)

    # -------------------------------------------------------------------------------- dead letters, queues
    def dead_letters(self, where: DeadFilter | None = None, *, limit: int | None = None) -> Iterator[DeadLetter]:
        """Yield jobs that ended without tags, newest first, with the message and the answer of each."""
        if where is not None and not isinstance(where, DeadFilter):
            raise refused("where", "a DeadFilter", where)
        return self._letters.read(where, limit=None if limit is None else read_whole("limit", limit))

    def dead_letter(self, job_id: str) -> DeadLetter | None:
        """One dead letter, or None."""
        return self._letters.show(read_id(job_id))

    def requeue(self, job_ids: str | Iterable[str]) -> list[str]:
        """Send dead letters to their lane again, under their old ids; return which went.

        Attempts are counted anew, and the old answer is forgotten: who waits for the id waits for the new one.
        """
        return self._letters.requeue(read_ids("job_ids", job_ids))

    def drop(self, job_ids: str | Iterable[str]) -> int:
        """Forget dead letters; return how many there were. Their answers stay."""
        return self._letters.drop(read_ids("job_ids", job_ids))

    def sweep(self, *, zone: tzinfo = UTC) -> SweepReport:
        """One round of what workers do for all jobs; for places where no worker may run. See `shiwu sweep`.

        Args:
            zone: time zone of an `expires` that names none, as the workers' `SHIWU_TIMEZONE`.
        """
        if not isinstance(zone, tzinfo):
            raise refused("zone", "a tzinfo as ZoneInfo('Asia/Shanghai')", zone)
        return self._maintenance.sweep(zone=zone)

    def queue_state(self) -> QueueState:
        """What waits and what is claimed, lane by lane."""
        return read_state(self._redis)

    def known_labels(self, digest: str) -> KnownLabels | None:
        """The labels behind `labels.digest` of an answer, or None where no worker has noted them.

        Workers note each set that they answer with; of those that requests brought along the last thousand are kept.
        """
        return self._notes.find(read_text("digest", digest, least=1, most=200))

    def stray_lanes(self) -> StrayLanes:
        """Lists that look like lanes and that no worker reads; searches for two seconds at most."""
        return find_stray_lanes(self._redis)


def _random_id(_: Request) -> str:
    return str(uuid4())
