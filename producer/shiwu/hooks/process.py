"""Builds the parts of `shiwu-hooks`, runs them in threads, and stops them."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import redis

from shiwu.broker.connection import connect
from shiwu.broker.redis_errors import explain, info_of
from shiwu.client.client import Client
from shiwu.contract import RESULT_STREAM
from shiwu.hooks.delivery_queue import ALONE_AFTER, DeliveryQueue, QueueOptions
from shiwu.hooks.dispatcher import Dispatcher, DispatchOptions
from shiwu.hooks.endpoints import Endpoints
from shiwu.hooks.event_log import EventLog, LibraryLines
from shiwu.hooks.intake import Intake, IntakeOptions
from shiwu.hooks.metrics import HooksMetrics
from shiwu.hooks.router import Router
from shiwu.hooks.sender import Sender
from shiwu.network.address_rules import AddressRules

REDIS_TIMEOUT_S: Final = 5.0
COUNT_EVERY_S: Final = 5.0
"""Seconds between two counts of the queue for Prometheus."""
RECLAIM_IDLE_S: Final = 30.0
"""How long answers stay with a process that has read and not added them."""
READ_BLOCK_S: Final = 0.5
"""How long one read of the stream waits for answers, and so the end for an idle one."""
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


def make_queue(client: redis.Redis, options: HooksOptions) -> DeliveryQueue:
    """The queue of deliveries with the limits of these options."""
    limits = QueueOptions(
        lease_s=options.lease_s,
        max_age_s=sum(options.schedule_s) + AGE_SLACK_S,
        max_dead=options.max_dead,
    )
    return DeliveryQueue(client, limits)


def make_sender(options: HooksOptions) -> Sender:
    """What posts deliveries."""
    return Sender(
        options.rules,
        timeout_s=options.timeout_s,
        threads=options.threads,
        user_agent=f"shiwu-hooks/{version('shiwu')}",
    )


def make_group(client: redis.Redis, options: HooksOptions) -> None:
    """Create the consumer group, unless it exists.

    Raises:
        redis.RedisError: Redis is unavailable, or refuses the command.
    """
    try:
        first = "0" if options.is_from_beginning else "$"
        client.xgroup_create(RESULT_STREAM, options.group, id=first, mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


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
            client = connect(
                options.redis_url, timeout_s=REDIS_TIMEOUT_S, max_connections=options.threads + 8, client_name="hooks"
            )
            stack.callback(client.close)
            reader = stack.enter_context(Client(options.redis_url, timeout_s=REDIS_TIMEOUT_S))
            self._make_group(client)
            deliveries, router = make_queue(client, options), Router(options.endpoints, has_urls=options.has_urls)
            intake = Intake(
                reader.results(
                    group=options.group,
                    consumer=options.consumer,
                    block_s=READ_BLOCK_S,
                    reclaim_idle_s=RECLAIM_IDLE_S,
                ),
                deliveries,
                router,
                IntakeOptions(group=options.group, max_pending=options.max_pending, alone_after=ALONE_AFTER),
                log=self._log,
                metrics=self._metrics,
            )
            dispatcher = Dispatcher(
                deliveries,
                make_sender(options),
                router,
                DispatchOptions(
                    schedule_s=options.schedule_s,
                    in_flight=options.in_flight,
                    threads=options.threads,
                    lease_s=options.lease_s,
                ),
                added=intake.added,
                log=self._log,
                metrics=self._metrics,
            )
            self._log.info("started", group=options.group, endpoints=len(options.endpoints.named))
            threads = [
                self._start(name, work)
                for name, work in (("read", intake.read), ("add", intake.add), ("dispatch", dispatcher.run))
            ]
            self._count_until_stopped(deliveries)
            intake.added.set()
            for thread in threads:
                thread.join(timeout=READ_STOP_S)
            dispatcher.close()
            self._log.info("stopped")
        return not self._failed

    def _make_group(self, client: redis.Redis) -> None:
        """Create the group, and wait for Redis where it is unavailable."""
        while not self._stop.is_set():
            try:
                make_group(client, self._options)
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
                logging.getLogger("shiwu").exception("thread %s failed", name)
                self._fail(name, f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _fail(self, thread: str, reason: str) -> None:
        if not self._stop.is_set():
            self._failed = True
            self._log.error("thread_failed", thread=thread, reason=reason)
            self.stop()

    def _count_until_stopped(self, deliveries: DeliveryQueue) -> None:
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
