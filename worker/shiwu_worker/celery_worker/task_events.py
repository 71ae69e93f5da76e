"""Celery's task events, for Flower and celery-exporter; sent where the worker runs with `-E`.

A job's events are sent together when it is answered, each with its own true time: what Celery's tools show is right,
only what they show of jobs under way is late.
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

from shiwu.contract import TASK_NAME, Status
from shiwu_worker.jobs.outcome import CommittedJob

log: Any = structlog.get_logger()
BEAT_S: Final = 2.0
MAX_WAITING: Final = 1000
"""Batches of answers; more are dropped, for events are a view and not the ledger."""


class TaskEventSender:
    """Sends events from `start` to `close`, over a connection of its own."""

    def __init__(self, app: Celery, *, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._waiting: queue.Queue[Sequence[CommittedJob]] = queue.Queue(MAX_WAITING)
        self._processed = 0
        self._dropped = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="task-events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, settled: Sequence[CommittedJob]) -> None:
        """Take answers. Never blocks."""
        try:
            self._waiting.put_nowait(settled)
        except queue.Full:
            self._dropped += len(settled)

    def close(self, *, timeout_s: float) -> None:
        """Say good-bye; what is left after `timeout_s` is dropped."""
        self._closed.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with self._app.connection_for_write() as connection:
                    self._connected(connection)
            except (OperationalError, OSError, *self._app.connection_for_write().connection_errors) as error:
                log.warning("events_unavailable", error=str(error)[:300])
                self._closed.wait(BEAT_S)
            except Exception:  # border: events are a view; a defect in them must not cost a job
                log.exception("events_failed")
                self._closed.wait(BEAT_S)

    def _connected(self, connection: Any) -> None:
        with self._app.events.Dispatcher(connection, hostname=self._hostname) as dispatcher:
            dispatcher.send("worker-online", **self._worker())
            beat_s = time.monotonic()
            while not (self._closed.is_set() and self._waiting.empty()):
                try:
                    for kind, fields in events_of(self._waiting.get(timeout=0.2)):
                        dispatcher.send(kind, **fields)
                        self._processed += kind in {"task-succeeded", "task-failed"}
                except queue.Empty:
                    pass
                if time.monotonic() - beat_s >= BEAT_S:
                    beat_s = time.monotonic()
                    dispatcher.send("worker-heartbeat", **self._worker())
                    if self._dropped:
                        log.warning("events_dropped", jobs=self._dropped)
                        self._dropped = 0
            dispatcher.send("worker-offline", **self._worker())

    def _worker(self) -> dict[str, Any]:
        load = os.getloadavg()
        return {
            "freq": BEAT_S,
            "active": 0,
            "processed": self._processed,
            "loadavg": load,
            "sw_ident": "shiwu",
            "sw_ver": "1",
            "sw_sys": os.uname().sysname,
        }


def events_of(settled: Sequence[CommittedJob]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, fields) of Celery's events for these answers, in the order in which they happened."""
    now_s, wall_s = time.monotonic(), time.time()
    for one in settled:
        if not one.is_first:
            continue
        job, answer = one.job, one.entry.answer
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
