"""The peers of the benchmark `messages`: plain Celery tasks, and celery-batches, with the same stand-in for a model.

`celery -A bench.peers:plain worker …` and `celery -A bench.peers:batches worker …`. Each answers a message with an
answer as large as shiwu's. A model that takes time is one device: one call at a time, over threads and processes.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from typing import Any, Final

from celery_batches import Batches, SimpleRequest

from bench.celery_app import TASK, WORDS, make_app

PER_PICTURE_S: Final = float(os.environ.get("BENCH_PER_PICTURE_MS", "0")) / 1000
PER_BATCH_S: Final = float(os.environ.get("BENCH_PER_BATCH_MS", "0")) / 1000
DEVICE_FILE: Final = os.environ.get("BENCH_DEVICE_FILE", "")
FLUSH_EVERY: Final = 256
FLUSH_INTERVAL_S: Final = 0.1
TAGS: Final = [{"label": word, "score": 0.2, "cosine": 0.1} for word in WORDS[:5]]
_own: Final = threading.local()


def _on_device(pictures: int) -> None:
    """Wait as long as a forward pass of so many images takes, with the device locked."""
    wait_s = PER_PICTURE_S * pictures + PER_BATCH_S
    if not wait_s:
        return
    if not hasattr(_own, "device"):
        _own.device = os.open(DEVICE_FILE, os.O_CREAT | os.O_WRONLY)
    fcntl.flock(_own.device, fcntl.LOCK_EX)
    try:
        time.sleep(wait_s)  # stands for the model
    finally:
        fcntl.flock(_own.device, fcntl.LOCK_UN)


def _answer(image: str) -> dict[str, Any]:
    return {"status": "tagged", "image": {"reference": image}, "tags": TAGS, "timing": {"total": 1.0}}


# Not `shared`: Celery gives a shared task to every app of the process, where the last one of a name wins.
plain = make_app("plain")


@plain.task(name=TASK, shared=False)  # type: ignore[untyped-decorator]  # celery has no types
def tag(image: str) -> dict[str, Any]:
    """Answer one image per message."""
    _on_device(1)
    return _answer(image)


batches = make_app("batches")


@batches.task(  # type: ignore[untyped-decorator]  # celery has no types
    name=TASK, shared=False, base=Batches, flush_every=FLUSH_EVERY, flush_interval=FLUSH_INTERVAL_S
)
def tag_batch(requests: list[SimpleRequest]) -> None:
    """Answer many messages per call; results are written one by one, as in its documentation."""
    _on_device(len(requests))
    for request in requests:
        batches.backend.mark_as_done(request.id, _answer(request.kwargs["image"]), request=request)
