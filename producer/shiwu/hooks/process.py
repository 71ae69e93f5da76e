"""Builds the parts of `shiwu-hooks`, runs them in threads, and stops them."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import redis

from shiwu.broker.redis_errors import explain, info_of
from shiwu.broker.sharding import PoolOptions, ShardRedis, keep_shard_count, open_shards
from shiwu.client.shard_stream import follow_shard
from shiwu.client.stream import StreamOptions, read_options
from shiwu.client.stream_items import UnreadableItem, log_unreadable
from shiwu.contract import RESULT_STREAM
from shiwu.hooks.delivery_queue import ALONE_AFTER, DeliveryQueue, QueueOptions
from shiwu.hooks.dispatcher import Dispatcher, DispatchOptions
from shiwu.hooks.endpoints import Endpoints
from shiwu.hooks.event_log import EventLog, LibraryLines
from shiwu.hooks.intake import Intake, IntakeOptions
from shiwu.hooks.metrics import HooksMetrics
from shiwu.hooks.router import Router
from shiwu.hooks.sender import Sender
from shiwu.hooks.shards import AllDeliveries, open_queues
from shiwu.hooks.try_slots import TrySlots
from shiwu.network.address_rules import AddressRules

REDIS_TIMEOUT_S: Final = 5.0
COUNT_EVERY_S: Final = 5.0
"""Seconds between two counts of the queue for Prometheus."""
RECLAIM_IDLE_S: Final = 30.0
"""How long answers stay with a process that has read and not added them."""
READ_BLOCK_S: Final = 0.5
"""How long one read of the stream waits for answers, and so the end for an idle one."""
READ_BATCH: Final = 100
"""Answers of one read."""
READ_STOP_S: Final = 3.0
"""How long the end waits for a read of the stream."""
AGE_SLACK_S: Final = 86_400.0
"""How much older than the whole schedule a delivery may become, while its endpoint is tried only now and then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HooksOptions:
    """Everything that the process is told; durations are in seconds."""

    redis_url: str
    endpoints: Endpoints
    rules: AddressRules
    schedule_s: tuple[float, ...]
    group: str = "hooks"
    consumer: str = "hooks"
    has_urls: bool = False
    timeout_s: float = 15.0
    lease_s: float = 60.0
    in_flight: int = 8
    threads: int = 32
    max_pending: int = 10_000
    max_dead: int = 10_000
    is_from_beginning: bool = False
    """Whether a new group gets the answers that are in the stream already."""


def queue_options(options: HooksOptions) -> QueueOptions:
    """The limits of the queue of deliveries."""
    return QueueOptions(
        lease_s=options.lease_s,
        max_age_s=sum(options.schedule_s) + AGE_SLACK_S,
        max_dead=options.max_dead,
    )


def stream_options(client: redis.Redis, options: HooksOptions) -> StreamOptions:
    """How the answers of one server or shard are read."""

    def report(entry_id: str, fields: Mapping[bytes, bytes], reason: str) -> None:
        log_unreadable(UnreadableItem(entry_id, fields, reason, client, options.group))

    return read_options(
        group=options.group,
        consumer=options.consumer,
        batch=READ_BATCH,
        block_s=READ_BLOCK_S,
        max_block_s=READ_BLOCK_S,
        reclaim_idle_s=RECLAIM_IDLE_S,
        stop_when_idle=False,
        away_s=None,
        on_unreadable=report,
    )


def make_sender(options: HooksOptions) -> Sender:
    """What posts deliveries."""
    return Sender(
        options.rules,
        timeout_s=options.timeout_s,
        threads=options.threads,
        user_agent=f"shiwu-hooks/{version('shiwu')}",
    )


def make_group(client: redis.Redis, group: str, *, is_from_beginning: bool) -> None:
    """Create the consumer group, unless it exists.

    Raises:
        redis.RedisError: Redis is unavailable, or refuses the command.
    """
    try:
        client.xgroup_create(RESULT_STREAM, group, id="0" if is_from_beginning else "$", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


@dataclass(frozen=True, slots=True)
class _Part:
    """What works on one server or shard."""

    client: ShardRedis
    intake: Intake
    dispatcher: Dispatcher
    suffix: str
    """Of the names of its threads."""


class HooksProcess:
    """The running process. `run` blocks until a signal or a defect; it returns whether it ended as asked."""

    def __init__(self, options: HooksOptions, *, log: EventLog, metrics: HooksMetrics) -> None:
        self._options = options
        self._log = log
        self._metrics = metrics
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._failed = False

    def stop(self) -> None:
        """Let `run` return; may be called from any thread and from a signal handler."""
        self._stop.set()
        self._wake.set()

    def run(self) -> bool:
        """Read, try and count until `stop`. Return False where a part failed.

        Raises:
            redis.RedisError: Redis cannot be used at the start, and time cannot cure that.
        """
        options = self._options
        with ExitStack() as stack:
            clients = open_shards(
                options.redis_url,
                PoolOptions(timeout_s=REDIS_TIMEOUT_S, max_connections=options.threads + 8, client_name="hooks"),
            )
            readers = open_shards(options.redis_url, PoolOptions(timeout_s=REDIS_TIMEOUT_S, client_name="hooks"))
            for client in (*clients, *readers):
                stack.callback(client.close)
            self._check_redis(clients)
            router = Router(options.endpoints, has_urls=options.has_urls)
            slots = TrySlots(threads=options.threads, in_flight=options.in_flight, is_named=router.is_named)
            queues = open_queues(clients, queue_options(options))
            sender = make_sender(options)
            parts = [
                self._make_part(
                    client, reader, queue, router=router, sender=sender, slots=slots, shard=shard, shards=len(clients)
                )
                for shard, client, reader, queue in zip(_shards(clients), clients, readers, queues, strict=True)
            ]
            self._log.info("started", group=options.group, endpoints=len(options.endpoints.named))
            threads = [thread for part in parts for thread in self._start_part(part)]
            self._count_until_stopped(AllDeliveries(queues))
            for part in parts:
                part.intake.added.set()
            until_s = time.monotonic() + READ_STOP_S
            for thread in threads:
                thread.join(timeout=max(0.0, until_s - time.monotonic()))
            slots.close()
            self._log.info("stopped")
        return not self._failed

    def _make_part(
        self,
        client: ShardRedis,
        reader: ShardRedis,
        deliveries: DeliveryQueue,
        *,
        router: Router,
        sender: Sender,
        slots: TrySlots,
        shard: int | None,
        shards: int,
    ) -> _Part:
        options = self._options
        intake = Intake(
            follow_shard(reader, client, stream_options(client, options), shard=shard),
            deliveries,
            router,
            IntakeOptions(group=options.group, max_pending=-(-options.max_pending // shards), alone_after=ALONE_AFTER),
            log=self._log,
            metrics=self._metrics,
            shard=shard,
        )
        dispatcher = Dispatcher(
            deliveries,
            sender,
            router,
            DispatchOptions(schedule_s=options.schedule_s, lease_s=options.lease_s),
            slots=slots,
            added=intake.added,
            log=self._log,
            metrics=self._metrics,
            shard=shard,
        )
        return _Part(client, intake, dispatcher, "" if shard is None else f"-{shard}")

    def _start_part(self, part: _Part) -> list[threading.Thread]:
        def read(stop: threading.Event) -> None:
            self._make_group(part.client)
            part.intake.read(stop)

        works = (("read", read), ("add", part.intake.add), ("dispatch", part.dispatcher.run))
        return [self._start(f"{name}{part.suffix}", work) for name, work in works]

    def _check_redis(self, clients: tuple[ShardRedis, ...]) -> None:
        """Find errors at the start that time cannot cure. Waits for one server; shards are waited for by their threads.

        Raises:
            redis.RedisError: such an error.
        """
        if len(clients) == 1:
            self._make_group(clients[0])
            return
        for client in clients:
            try:
                if client is clients[0]:
                    keep_shard_count(client, shards=len(clients))
                self._create_group(client)
            except redis.RedisError as error:
                if info_of(error).ends_start:
                    raise

    def _create_group(self, client: redis.Redis) -> None:
        make_group(client, self._options.group, is_from_beginning=self._options.is_from_beginning)

    def _make_group(self, client: redis.Redis) -> None:
        """Create the group, and wait for Redis where it is unavailable."""
        while not self._stop.is_set():
            try:
                self._create_group(client)
            except redis.RedisError as error:
                if info_of(error).ends_start:
                    raise
                self._log.warning("redis_unavailable", reason=explain(error))
                self._stop.wait(1.0)
            else:
                return

    def _start(self, name: str, work: Callable[[threading.Event], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work(self._stop)
            except redis.RedisError as error:
                self._fail(name, explain(error))
            except Exception as error:  # the process must not go on without this thread
                self._fail(name, f"{type(error).__name__}: {error}")
                with suppress(OSError):  # as in `_fail`
                    logging.getLogger("shiwu").exception("thread %s failed", name)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _fail(self, thread: str, reason: str) -> None:
        if not self._stop.is_set():
            self._failed = True
            self.stop()
            # The output may be what failed; then the last line of `run` meets the same error.
            with suppress(OSError):
                self._log.error("thread_failed", thread=thread, reason=reason)

    def _count_until_stopped(self, deliveries: AllDeliveries) -> None:
        names = [endpoint.key for endpoint in self._options.endpoints.named]
        while True:
            try:
                self._metrics.counted(
                    pending=deliveries.pending(names), health=deliveries.health(), dead=deliveries.dead_count()
                )
            except (redis.RedisError, OSError):
                self._metrics.redis_up.set(0)  # the threads say why
            if self._stop.wait(COUNT_EVERY_S):
                return


def _shards(clients: Sequence[ShardRedis]) -> Sequence[int | None]:
    """The indexes of the shards, or None for one server."""
    return [None] if len(clients) == 1 else range(len(clients))


@contextmanager
def library_lines(log: EventLog) -> Iterator[None]:
    """Write the warnings of the client library as lines of the log."""
    library = logging.getLogger("shiwu")
    library.addHandler(handler := LibraryLines(log))
    try:
        yield
    finally:
        library.removeHandler(handler)


def stop_on_signals(process: HooksProcess) -> None:
    """Let SIGTERM and SIGINT stop the process; tries under way are finished."""

    def stop(*_: object) -> None:
        # A handler that interrupts the main thread in its wait for the event could wait forever for the lock of it.
        threading.Thread(target=process.stop, name="stop", daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
