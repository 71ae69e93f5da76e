"""The peers of the message benchmark: plain Celery tasks, and celery-batches, at their best settings.

`celery -A bench.peers:threads worker …` and `celery -A bench.peers:batches worker …`. Each answers a message with the
answer that shiwu's stand-in gives, in Celery's own Redis result backend.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery
from celery_batches import Batches, SimpleRequest

URL = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379/0")
TAGS = [{"label": word, "score": 0.2, "cosine": 0.1} for word in ("动物", "人物", "交通工具", "食物", "建筑")]


def _app(name: str) -> Celery:
    app = Celery(name, broker=URL, backend=URL)
    app.conf.update(
        task_acks_late=True,
        worker_send_task_events=False,
        task_default_queue="shiwu.bulk",
        broker_transport_options={"priority_steps": [0]},
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
    )
    return app


def _answer(image: str) -> dict[str, Any]:
    return {"status": "tagged", "image": {"reference": image}, "tags": TAGS, "timing": {"total": time.time()}}


threads = _app("threads")


@threads.task(name="shiwu.tag")
def tag(image: str) -> dict[str, Any]:
    """One picture a message."""
    return _answer(image)


batches = _app("batches")


@batches.task(name="shiwu.tag", base=Batches, flush_every=256, flush_interval=0.1)
def tag_batch(requests: list[SimpleRequest]) -> None:
    """Many messages a call; the results are written one by one, as its documentation shows."""
    for request in requests:
        batches.backend.mark_as_done(request.id, _answer(request.kwargs["image"]), request=request)
