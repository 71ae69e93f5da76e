"""Celery's task events for Flower and celery-exporter; sent if the worker runs with `-E`.

The events of a job are sent together when it is answered, each with its own time. So tools show correct times, but jobs
in flight appear late.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from structlog.typing import FilteringBoundLogger

from shiwu.contract import TASK_NAME, Status
from shiwu_worker.jobs.outcome import CommittedJob
from shiwu_worker.runtime.threads import ServiceThread

log: FilteringBoundLogger = structlog.get_logger()
HEARTBEAT_EVERY_S: Final = 2.0
MAX_WAITING: Final = 1000
"""Largest number of queued commits; the events of further ones are dropped."""


class TaskEventSender:
    """Sends events on its own thread and connection, from `start` to `close`."""

    def __init__(self, app: Celery, *, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._waiting: queue.Queue[Sequence[CommittedJob]] = queue.Queue(MAX_WAITING)
        self._processed = 0
        self._dropped = 0
        self._closed = threading.Event()
        self._thread = ServiceThread("task-events", self._run, on_fatal=None, stop=self._closed.set)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, committed: Sequence[CommittedJob]) -> None:
        """Queue the jobs of a commit. Never blocks."""
        try:
            self._waiting.put_nowait(committed)
        except queue.Full:
            self._dropped += len(committed)

    def ask_to_end(self) -> None:
        """Let the thread end once it has sent what is queued, without waiting for it."""
        self._thread.ask_to_end()

    def close(self, *, timeout_s: float) -> None:
        """Send the queued events and `worker-offline`, within `timeout_s`; the rest is dropped."""
        self._thread.close(timeout_s)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with self._app.connection_for_write() as connection:
                    self._connected(connection)
            except (OperationalError, OSError, *self._app.connection_for_write().connection_errors) as error:
                log.warning("events_unavailable", error=str(error)[:300])
                self._closed.wait(HEARTBEAT_EVERY_S)
            except Exception:  # border: a defect in events must not fail a job
                log.exception("events_failed")
                self._closed.wait(HEARTBEAT_EVERY_S)

    def _connected(self, connection: Any) -> None:
        with self._app.events.Dispatcher(connection, hostname=self._hostname) as dispatcher:
            dispatcher.send("worker-online", **self._worker())
            heartbeat_s = time.monotonic()
            while not (self._closed.is_set() and self._waiting.empty()):
                try:
                    for kind, fields in events_of(self._waiting.get(timeout=0.2)):
                        dispatcher.send(kind, **fields)
                        self._processed += kind in {"task-succeeded", "task-failed"}
                except queue.Empty:
                    pass
                if time.monotonic() - heartbeat_s >= HEARTBEAT_EVERY_S:
                    heartbeat_s = time.monotonic()
                    dispatcher.send("worker-heartbeat", **self._worker())
                    if self._dropped:
                        log.warning("events_dropped", jobs=self._dropped)
                        self._dropped = 0
            dispatcher.send("worker-offline", **self._worker())

    def _worker(self) -> dict[str, Any]:
        load = os.getloadavg()
        return {
            "freq": HEARTBEAT_EVERY_S,
            "active": 0,
            "processed": self._processed,
            "loadavg": load,
            "sw_ident": "shiwu",
            "sw_ver": "1",
            "sw_sys": os.uname().sysname,
        }


def events_of(committed: Sequence[CommittedJob]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the kind and fields of Celery's events for the jobs of a commit, in chronological order."""
    now_s, wall_s = time.monotonic(), time.time()
    for item in committed:
        if not item.is_first:
            continue
        job, answer = item.job, item.entry.answer
        claimed = wall_s - (now_s - job.moments.claimed_s)
        ended = claimed + (answer.timing.total - (answer.timing.earlier or 0.0) - (answer.timing.queue or 0.0)) / 1000
        kwargs = repr({"image": answer.image.reference}) if answer.image else "{}"
        yield (
            "task-received",
            {
                "uuid": answer.id,
                "name": TASK_NAME,
                "args": "()",
                "kwargs": kwargs,
                "retries": job.attempt - 1,
                "eta": None,
                "expires": None,
                "root_id": answer.id,
                "parent_id": None,
                "timestamp": claimed,
            },
        )
        if answer.status in {Status.EXPIRED, Status.CANCELLED}:
            is_expired = answer.status is Status.EXPIRED
            yield (
                "task-revoked",
                {"uuid": answer.id, "terminated": False, "signum": None, "expired": is_expired, "timestamp": ended},
            )
            continue
        yield "task-started", {"uuid": answer.id, "timestamp": claimed}
        runtime = ended - claimed
        if answer.status is Status.TAGGED:
            result = ", ".join(tag.label for tag in answer.tags or ())
            fields = {"uuid": answer.id, "result": result, "runtime": runtime, "timestamp": ended}
            yield "task-succeeded", fields
        else:
            text = f"{answer.error.code}: {answer.error.message}" if answer.error else str(answer.status)
            yield "task-failed", {"uuid": answer.id, "exception": text, "traceback": None, "timestamp": ended}
