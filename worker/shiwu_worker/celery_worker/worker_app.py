"""The Celery app: an ordinary Celery worker with a boot step that runs the pipeline.

`celery -A shiwu_worker.app worker` claims from the lanes with the pipeline, not with Celery's consumer. That consumer
listens on an empty queue, so a connection error there never affects a job. Celery is imported in this package only.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Final

import structlog
from celery import Celery, bootsteps
from celery.signals import setup_logging
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Queue
from structlog.typing import FilteringBoundLogger

from shiwu.broker.backoff import Backoff
from shiwu.contract import TASK_NAME, Lane
from shiwu_worker.celery_worker.celery_redis import admin_config
from shiwu_worker.celery_worker.lane_worker import ADMIN_QUEUE
from shiwu_worker.celery_worker.senders import Senders, open_senders
from shiwu_worker.celery_worker.stop_signals import StopSignals
from shiwu_worker.config.errors import load_settings_or_exit, report_unknown_names
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import BROKEN_DEVICE, FatalError
from shiwu_worker.runtime.process import exit_now
from shiwu_worker.service.bootstrap import WorkerService, open_service
from shiwu_worker.telemetry import logs
from shiwu_worker.telemetry.log_output import open_standard_streams

log: FilteringBoundLogger = structlog.get_logger()
CONSUMER_STOP_S: Final = 1.0
"""How long Celery's consumer may take to close when the worker stops; the grace time counts meanwhile."""
RECONNECT_S: Final = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 5.0}
STABLE_AFTER_S: Final = 10.0
"""After a connection of this length, the next failure gets the shortest pause again."""


class AdminConsumer(Consumer):  # type: ignore[misc]  # celery has no types
    """Celery's consumer without gossip, mingle and heartbeats; it handles three remote-control commands."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]  # celery has no types
        """The steps that a worker without tasks needs.

        Gossip, mingle and heartbeats can block without a broker. Celery adds each step that another one requires, so
        the steps of tasks and remote control are subclasses that do not require them.
        """

        default_steps: ClassVar[list[str]] = [
            "celery.worker.consumer.connection:Connection",
            "celery.worker.consumer.events:Events",
            "shiwu_worker.celery_worker.control:TasksStep",
            "shiwu_worker.celery_worker.control:ControlStep",
            "celery.worker.consumer.consumer:Evloop",
        ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._backoff = Backoff()
        self._retried_s = 0.0
        super().__init__(*args, **kwargs)

    def ensure_connected(self, conn: Any) -> Any:
        """Retry every few seconds; during Celery's pauses of up to 32 s every revoke would be lost."""
        conn.ensure_connection = partial(conn.ensure_connection, **RECONNECT_S)
        return super().ensure_connected(conn)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Pause before the next try, for servers that accept connections and refuse a command."""
        super().on_connection_error_before_connected(exc)
        self._pause()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Report that no revokes are received, and pause before the next try.

        The pipeline may have Redis again before the pause is over, and would be ready without revokes.
        """
        self.app.shiwu_on_receiving_revokes(active=False)
        super().on_connection_error_after_connected(exc)
        self._pause()

    def stop(self) -> None:
        """Close Celery's own connections, for CONSUMER_STOP_S at most: it takes a dozen round trips."""
        stopping = threading.Thread(target=super().stop, name="celery-stop", daemon=True)
        stopping.start()
        stopping.join(CONSUMER_STOP_S)

    def _pause(self) -> None:
        now_s = time.monotonic()
        if now_s - self._retried_s >= STABLE_AFTER_S:
            self._backoff.reset()
        pause_s = self._backoff.next_s()
        self._retried_s = now_s + pause_s
        threading.Event().wait(pause_s)


class PipelineBootStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Starts the service before Celery reports ready, and drains it on shutdown.

    A boot step, because Celery ignores exceptions of signal handlers and would report ready nevertheless.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_: Any) -> None:
        self._stack = ExitStack()
        self._signals = StopSignals(worker.hostname)
        self._service: WorkerService | None = None
        self._senders: Senders | None = None
        self._fatal: FatalError | None = None
        self._grace_s = 0.0

    def start(self, worker: Any) -> None:
        """Load the model, warm up, and start claiming.

        A failure exits the process with the exit code of the error, a signal with 0.
        """
        settings = _settings().model_copy(update={"lanes": worker.app.conf.shiwu_lanes})
        self._grace_s = settings.grace_s
        self._signals.install(has_files=settings.labels_dir is not None)
        with ExitStack() as stack:
            try:
                self._senders = stack.enter_context(open_senders(worker, settings))
                service = stack.enter_context(
                    open_service(
                        settings,
                        on_fatal=self._on_fatal,
                        on_committed=self._senders.put,
                        is_waiting_for_revokes=settings.revoke,
                    )
                )
            except FatalError as error:
                log.error("start_failed", exit_code=int(error.exit_code), reason=error.exit_code.name, error=str(error))
                if error.exit_code in BROKEN_DEVICE:
                    stack.close()
                    exit_now(int(error.exit_code))
                raise SystemExit(int(error.exit_code)) from error
            except SystemExit:
                log.info("stopped", reason="asked to", during="start")
                raise
            self._service, self._stack = service, stack.pop_all()
            worker.app.shiwu_on_receiving_revokes = service.receiving_revokes
            self._signals.started(service.hurry, reload=service.reload_labels)

    def stop(self, worker: Any) -> None:
        """Drain within the grace time; after a fatal error release all jobs immediately."""
        service, self._service = self._service, None
        if service is None:
            return
        reason = "asked to" if self._signals.count else "Celery's loop ended"
        log.info("stopping", reason=self._fatal.exit_code.name if self._fatal else reason)
        service.stop(grace_s=0.0 if self._fatal else max(0.0, self._grace_s - self._signals.age_s()))
        if self._senders is not None:
            self._senders.ask_to_end()  # they end while the loaders do
        self._stack.close()
        log.info("stopped")
        if self._fatal is not None and self._fatal.exit_code in BROKEN_DEVICE:
            exit_now(int(self._fatal.exit_code))

    terminate = stop

    def _on_fatal(self, error: FatalError) -> None:
        """Make Celery's loop exit the process with the exit code of the error. Thread-safe."""
        if self._fatal is None:
            self._fatal = error
            log.error("fatal", exit_code=int(error.exit_code), reason=error.exit_code.name, error=str(error))
            state.should_stop = int(error.exit_code)


class LaneCelery(Celery):  # type: ignore[misc]  # celery has no types
    """An app whose worker reads `-Q` as lanes."""

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 Celery's name
        """The class that the command `worker` starts."""
        return self.subclass_with_self("shiwu_worker.celery_worker.lane_worker:LaneWorker")


def make_app(settings: Settings) -> Celery:
    """Return the app, with settings under which Celery cannot stop the pipeline."""
    app = LaneCelery("shiwu")
    app.conf.update(
        **admin_config(settings.redis_address, timeout_s=settings.redis_timeout_s),
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
        # Calls of `shiwu.tag` through this app are interactive; no worker reads Celery's default queue.
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
    # As aliases, so that `celery purge` skips the lanes; purged jobs would have no answer.
    app.shiwu_queues = [Queue(lane.queue, alias=lane.queue) for lane in Lane]
    app.amqp.queues.aliases.update({queue.name: queue for queue in app.shiwu_queues})
    app.shiwu_revoker = None
    app.shiwu_on_receiving_revokes = lambda *, active: None
    app.steps["worker"].add(PipelineBootStep)

    @app.task(name=TASK_NAME)  # type: ignore[untyped-decorator]  # celery has no types
    def tag(image: str, **_: Any) -> None:
        """Stand for the task that the pipeline answers; Celery never runs it."""
        raise RuntimeError(f"expected {image!r} in a lane of shiwu, not in Celery's own queue")

    app.finalize()
    for name in set(app.tasks) - {TASK_NAME}:
        # `celery.group` and similar tasks send whatever a message names.
        app.tasks.unregister(name)
    return app


@setup_logging.connect  # type: ignore[untyped-decorator]  # celery has no types
def _logs(logfile: str | None = None, **_: Any) -> None:
    settings = _settings()
    logs.set_up(level=settings.log_level, form=settings.log_format, log_file=logfile)
    report_unknown_names()


@lru_cache(maxsize=1)
def _settings() -> Settings:
    """Return the settings, read once, so that a later change of the environment cannot disturb the shutdown."""
    return load_settings_or_exit()


@lru_cache(maxsize=1)
def load_app() -> Celery:
    """Return the app of this process, with the settings of its environment."""
    open_standard_streams()
    return make_app(_settings())
