"""Celery apps for the workers of `drill.peers`: one for plain tasks and one for celery-batches.

The tasks are not `shared`: Celery gives a shared task to every app of the process, where the last one of a name wins.
Both record an execution by RPUSH of the job's id instead of a result; the drill counts them by id afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import redis
from celery import Celery
from celery.signals import worker_ready
from celery_batches import Batches, SimpleRequest

URL: Final = os.environ.get("DRILL_REDIS_URL", "redis://127.0.0.1:6379/0")
READY_FILE: Final = os.environ.get("DRILL_READY_FILE", "")
QUEUE: Final = "drill"
TASK: Final = "drill.tag"
EFFECTS: Final = "effects"
"""A list: the id of every execution, in order."""
REDELIVERED: Final = "redelivered"
"""A set: ids whose message a worker got a second time."""
JOB_S: Final = 0.001
VISIBILITY_S: Final = 10
SWEEP_S: Final = 1
FLUSH_EVERY: Final = 64
FLUSH_INTERVAL_S: Final = 0.1
CONCURRENCY: Final = 2

SETTINGS: Final[dict[str, Any]] = {
    "task_default_queue": QUEUE,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_ignore_result": True,
    "worker_prefetch_multiplier": 1,
    "worker_send_task_events": False,
    "worker_enable_remote_control": False,
    "broker_connection_retry_on_startup": True,
    "broker_transport_options": {
        "visibility_timeout": VISIBILITY_S,
        # By default abandoned messages are searched every 10 s * 10 only, and a worker that crashes during the search
        # blocks the search of the others for 300 s.
        "unacked_restore_interval": SWEEP_S,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": VISIBILITY_S,
    },
}

_client = redis.Redis.from_url(URL, socket_timeout=10.0)


def _record(ids: Sequence[str], redelivered: Sequence[str]) -> None:
    if redelivered:
        _client.sadd(REDELIVERED, *redelivered)
    _client.rpush(EFFECTS, *ids)


def _is_redelivered(delivery_info: dict[str, Any] | None) -> bool:
    return bool((delivery_info or {}).get("redelivered"))


@worker_ready.connect  # type: ignore[untyped-decorator]  # Celery has no types
def _touch_ready_file(**_: object) -> None:
    if READY_FILE:
        Path(READY_FILE).touch()


plain = Celery("plain", broker=URL)
plain.conf.update(SETTINGS)


@plain.task(name=TASK, shared=False, bind=True)  # type: ignore[untyped-decorator]  # Celery has no types
def tag(self: Any, job_id: str) -> None:
    """Run one job per message; the sleep stands for the model."""
    time.sleep(JOB_S)  # stands for the model
    _record([job_id], [job_id] if _is_redelivered(self.request.delivery_info) else [])


batches = Celery("batches", broker=URL)
# Its documentation: with a smaller prefetch than flush_every no batch is ever full. Each process may hold a full batch.
batches.conf.update(SETTINGS | {"worker_prefetch_multiplier": FLUSH_EVERY})


@batches.task(  # type: ignore[untyped-decorator]  # Celery has no types
    name=TASK, shared=False, base=Batches, flush_every=FLUSH_EVERY, flush_interval=FLUSH_INTERVAL_S, acks_late=True
)
def tag_batch(requests: list[SimpleRequest]) -> None:
    """Run many jobs per call; one command records all effects, so that few kills leave half a batch."""
    time.sleep(JOB_S * len(requests))  # stands for the model
    ids = [request.args[0] for request in requests]
    _record(ids, [request.args[0] for request in requests if _is_redelivered(request.delivery_info)])
