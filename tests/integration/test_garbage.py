"""What the cycle collector has to visit while a worker runs."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from contextlib import ExitStack

import pytest

from shiwu.contract import Lane
from shiwu_worker.jobs.job import Claimed, open_job
from shiwu_worker.runtime.garbage import YOUNG_OBJECTS, freeze_imported, freeze_started
from tests.support import pictogram
from tests.support.processes import clean_environment

SERVICE = """
import gc
from threadpoolctl import threadpool_info
from shiwu_worker.service import bootstrap
from shiwu_worker.telemetry import logs
from shiwu_worker.config.settings import Settings
logs.set_up(level="warning", form="json")
with bootstrap.open_service(Settings(), on_fatal=print):
    print(gc.get_freeze_count(), len(gc.get_objects()))
    print(max(each["num_threads"] for each in threadpool_info() if each["internal_api"] == "openblas"), 0)
print(gc.get_freeze_count(), 0)
"""


class Node:
    """Refers to itself, so only the cycle collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_of_the_start_is_collected() -> None:
    gc.disable()
    try:
        ref = weakref.ref(Node())
        assert ref() is not None
        with ExitStack() as stack:
            freeze_started(stack)
            assert ref() is None
    finally:
        gc.enable()


def test_objects_are_exempt_until_the_stack_is_closed() -> None:
    kept = [Node()]
    with ExitStack() as stack:
        freeze_imported()
        freeze_started(stack)
        later = [Node()]
        objects = gc.get_objects()
        assert not any(item is kept for item in objects)
        assert any(item is later for item in objects)
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_collections_are_rare_until_the_stack_is_closed() -> None:
    before = gc.get_threshold()
    with ExitStack() as stack:
        freeze_started(stack)
        assert gc.get_threshold() == (YOUNG_OBJECTS, *before[1:])
    assert gc.get_threshold() == before


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[" * 100_000,
        b'{"headers": {"id": "k1", "task": "other"}, "body": ""}',
        b'{"headers": {"id": "k1", "task": "shiwu.tag"}, "body": "[{]", "content-type": "application/json"}',
        b'{"headers": {"id": "k1", "task": "shiwu.tag", "compression": "gzip"}, "content-type": "application/json"}',
        b'{"headers": {"id": "k1", "task": "shiwu.tag"}, "body": "[[1],{},{}]", "content-type": "application/json"}',
    ],
)
def test_unreadable_message_leaves_nothing_to_collect(raw: bytes) -> None:
    """Collections are rare, so that cycles which hold messages of a megabyte would fill the memory."""
    claimed = Claimed(id="k1", attempt=1, key=Lane.BULK.queue, raw=raw, claimed_ms=1.0, claimed_s=1.0)
    open_job(claimed)
    gc.collect()
    gc.disable()
    try:
        assert open_job(claimed).error is not None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_running_worker_exempts_what_its_start_created(redis_url: str) -> None:
    """The model's libraries create more than 300,000 objects; none is left to visit. BLAS has one thread."""
    ran = subprocess.run(
        [sys.executable, "-c", SERVICE],
        env=clean_environment({"SHIWU_REDIS_URL": redis_url, "SHIWU_MAX_BATCH": "8", **pictogram.SETTINGS}),
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
    )
    (frozen, visited), (blas_threads, _), (after, _) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert frozen > 100_000
    assert visited < 0.1 * frozen
    assert after == 0
    assert blas_threads == 1
