"""The Celery app: an ordinary Celery worker whose boot step runs the pipeline.

Celery is imported in this package only.

`celery -A shiwu_worker.app worker` claims from the lanes with the pipeline, not with Celery's consumer. What is left of
that consumer listens on a queue of its own that nobody writes to, so a broker blip there never touches a job.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Final

import structlog
from celery import Celery, bootsteps
from celery.signals import setup_logging
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Queue

from shiwu.contract import TASK_NAME, Lane
from shiwu_worker.celery_worker.callback_app import make_callback_app
from shiwu_worker.celery_worker.callbacks import CallbackSender
from shiwu_worker.celery_worker.celery_redis import broker_config
from shiwu_worker.celery_worker.lane_worker import ADMIN_QUEUE
from shiwu_worker.celery_worker.revoke import Revoker
from shiwu_worker.celery_worker.stop_signals import StopSignals
from shiwu_worker.celery_worker.task_events import TaskEventSender
from shiwu_worker.config.errors import load_settings_or_exit, report_unknown_names
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import FatalError
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.service.bootstrap import WorkerService, open_service
from shiwu_worker.service.factories import CELERY_CONNECTIONS, connect, make_answer_store
from shiwu_worker.telemetry import logs
from shiwu_worker.telemetry.log_output import open_standard_streams

log: Any = structlog.get_logger()
CLOSE_S: Final = 5.0
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
RECONNECT_S: Final = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 5.0}
CALM_S: Final = 10.0
"""A connection that lasted so long was a good one."""


class AdminConsumer(Consumer):  # type: ignore[misc]  # celery has no types
    """Celery's consumer without the parts by which workers talk to each other; it knows three control commands."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]  # celery has no types
        """The usual steps but gossip, mingle and heartbeats: each can block a worker when the broker is away."""

        default_steps: ClassVar[list[str]] = [
            step
            for step in Consumer.Blueprint.default_steps
            if step.rsplit(":", 1)[-1] not in {"Gossip", "Mingle", "Heart", "Control"}
        ] + ["shiwu_worker.celery_worker.control:ControlStep"]

    _pause_s = 0.0
    _lost_s = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Another step names mingle as one that it needs, which brings it back; disabled it does nothing.
        super().__init__(*args, **{**kwargs, "without_mingle": True})

    def ensure_connected(self, conn: Any) -> Any:
        """Try every few seconds: Celery's pauses grow to half a minute, in which every revoke would be lost."""
        conn.ensure_connection = partial(conn.ensure_connection, **RECONNECT_S)
        return super().ensure_connected(conn)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Pause before the next try: a server that takes connections and refuses a command would be asked for ever."""
        super().on_connection_error_before_connected(exc)
        self._pause()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """The same."""
        super().on_connection_error_after_connected(exc)
        self._pause()

    def _pause(self) -> None:
        now_s = time.monotonic()
        is_again = now_s - self._lost_s < CALM_S
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2 if is_again and self._pause_s else FIRST_PAUSE_S)
        self._lost_s = now_s + self._pause_s
        threading.Event().wait(self._pause_s)


class PipelineBootStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Opens the service before Celery says ready, and drains it on shutdown.

    A worker boot step and not a signal handler: Celery swallows what a handler raises, and would claim to be ready.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_: Any) -> None:
        self._stack = ExitStack()
        self._signals = StopSignals(worker.hostname)
        self._service: WorkerService | None = None
        self._fatal: FatalError | None = None
        self._grace_s = 0.0

    def start(self, worker: Any) -> None:
        """Load, warm up, start claiming.

        A failure here ends the process with the error's exit code, a signal with 0.
        """
        settings = _settings().model_copy(update={"lanes": worker.app.conf.shiwu_lanes})
        self._grace_s = settings.grace_s
        self._signals.install()
        with ExitStack() as stack:
            try:
                tell = stack.enter_context(_celery_side(worker, settings))
                service = stack.enter_context(
                    open_service(settings, on_fatal=self._end, on_answered=tell, waits_for_revokes=settings.revoke)
                )
            except FatalError as error:
                log.error("start_failed", exit_code=int(error.exit_code), reason=error.exit_code.name, error=str(error))
                raise SystemExit(int(error.exit_code)) from error
            except SystemExit:
                log.info("stopped", reason="asked to", during="start")
                raise
            self._service, self._stack = service, stack.pop_all()
            worker.app.shiwu_on_receiving_revokes = service.receiving_revokes
            self._signals.started(service.hurry)

    def stop(self, worker: Any) -> None:
        """Drain within the grace time; a second signal gives everything back at once."""
        service, self._service = self._service, None
        if service is None:
            return
        asked = "asked to" if self._signals.count else "Celery's loop ended"
        log.info("stopping", reason=self._fatal.exit_code.name if self._fatal else asked)
        service.stop(grace_s=0.0 if self._fatal else self._grace_s)
        self._stack.close()
        log.info("stopped")

    terminate = stop

    def _end(self, error: FatalError) -> None:
        """Make Celery's loop end the process with the error's exit code. Called from any thread."""
        if self._fatal is None:
            self._fatal = error
            log.error("fatal", exit_code=int(error.exit_code), reason=error.exit_code.name, error=str(error))
            state.should_stop = int(error.exit_code)


@contextmanager
def _celery_side(worker: Any, settings: Settings) -> Iterator[Callable[[Sequence[CommittedJob]], None]]:
    """What Celery's users expect of an answered job: its callbacks, and events where the worker runs with `-E`."""
    with ExitStack() as stack:
        client = stack.enter_context(connect(settings, connections=CELERY_CONNECTIONS))
        if settings.revoke:
            worker.app.shiwu_revoker = Revoker(
                client, make_answer_store(settings, client, f"revoke.{secrets.token_hex(4)}")
            )
        callbacks = CallbackSender(make_callback_app(settings), client, rules=settings.callback_rules)
        parts: list[CallbackSender | TaskEventSender] = [callbacks]
        if worker.task_events:
            parts.append(TaskEventSender(worker.app, hostname=worker.hostname))
        for part in parts:
            part.start()
            stack.callback(part.close, timeout_s=CLOSE_S)

        def tell(settled: Sequence[CommittedJob]) -> None:
            state.total_count[TASK_NAME] += len(settled)
            for part in parts:
                part.put(settled)

        yield tell


class LaneCelery(Celery):  # type: ignore[misc]  # celery has no types
    """An app whose worker reads `-Q` as lanes."""

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 Celery's name
        """The class that the command `worker` starts."""
        return self.subclass_with_self("shiwu_worker.celery_worker.lane_worker:LaneWorker")


def make_app(settings: Settings) -> Celery:
    """The app with settings that can't take the pipeline down."""
    app = LaneCelery("shiwu")
    app.conf.update(
        **broker_config(settings.redis_address, timeout_s=settings.redis_timeout_s),
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        task_default_queue=ADMIN_QUEUE,
        task_queues=[Queue(ADMIN_QUEUE)],
        task_create_missing_queues=False,
        # Who calls `shiwu.tag` by this app waits for it; Celery's own queue is read by nobody.
        task_routes={TASK_NAME: {"queue": Lane.INTERACTIVE.queue}},
        worker_consumer="shiwu_worker.celery_worker.worker_app:AdminConsumer",
        worker_pool="solo",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    app.conf.shiwu_revoke = settings.revoke
    app.conf.shiwu_lanes = settings.lanes
    # As aliases: `celery purge` then spares the lanes, whose jobs would be lost without an answer.
    app.shiwu_queues = [Queue(lane.queue, alias=lane.queue) for lane in Lane]
    app.amqp.queues.aliases.update({queue.name: queue for queue in app.shiwu_queues})
    app.shiwu_revoker = None
    app.shiwu_on_receiving_revokes = lambda *, active: None
    app.steps["worker"].add(PipelineBootStep)

    @app.task(name=TASK_NAME)  # type: ignore[untyped-decorator]  # celery has no types
    def tag(image: str, **_: Any) -> None:
        """Answered by the pipeline from the lanes; Celery itself never runs it."""
        raise RuntimeError(f"expected {image!r} in a lane of shiwu, not in Celery's own queue")

    app.finalize()
    for name in set(app.tasks) - {TASK_NAME}:
        # `celery.group` and its like send whatever a message says.
        app.tasks.unregister(name)
    return app


@setup_logging.connect  # type: ignore[untyped-decorator]  # celery has no types
def _logs(logfile: str | None = None, **_: Any) -> None:
    settings = _settings()
    logs.set_up(level=settings.log_level, form=settings.log_format, log_file=logfile)
    report_unknown_names()


@lru_cache(maxsize=1)
def _settings() -> Settings:
    """The settings, read once: what is wrong with them later must not keep a worker from ending well."""
    return load_settings_or_exit()


@lru_cache(maxsize=1)
def load_app() -> Celery:
    """The app of this process, with the settings of its environment."""
    open_standard_streams()
    return make_app(_settings())
