"""The main path with stages that the test controls: which jobs go on, which end, in which order, and in which slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from shiwu.contract import ErrorCode, ErrorInfo, Lane
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Release
from shiwu_worker.jobs.outcome import Answered, Released
from shiwu_worker.pipeline.batch_executor import LaunchedBatch
from shiwu_worker.pipeline.pipeline import STILL_IN_FLIGHT_DELAY_S
from tests.support.pipeline_stubs import BROKEN, ENCODED, LABELS, RETRIED, SLOTS, Parts, make_jobs
from tests.support.waiting import wait_until


@pytest.fixture
def parts() -> Iterator[Parts]:
    """A pipeline that runs, and is stopped after the test."""
    made = Parts()
    made.pipeline.start()
    made.claims.wait_running()
    yield made
    made.device_free.set()
    made.pipeline.stop(grace_s=0.0)


def test_job_passes_all_stages_to_its_answer(parts: Parts) -> None:
    """With a slot and a label set, which the loaders and the device get; its times and the load are recorded."""
    [job] = make_jobs("a")
    before_s = parts.progress._last_s
    parts.claims.claimed([job])
    [task] = parts.tasks
    assert (task.slot, task.image, task.lane, task.source) == (job.slot, "s3://b/k", Lane.INTERACTIVE, "s3://b")
    parts.load("a")
    assert parts.outcome("a") == Answered(job)
    assert (job.label_set, job.labels) == (LABELS, ENCODED)
    image = job.image
    assert image is not None
    assert (image.format, image.width, image.height, image.bytes) == ("PNG", 3, 2, 7)
    assert image.sha256 == job.sha256 == f"{task.ticket:064x}"
    moments = job.moments
    assert (moments.fetch_from_s, moments.decode_from_s, moments.batch_from_s) == (1.0, 1.25, 1.75)
    assert not job.is_on_device
    assert parts.progress._last_s > before_s
    with parts.meter._lock:
        assert (parts.meter._fetch_s, parts.meter._decode_s) == (0.25, 0.5)
        assert (parts.meter._images, parts.meter._batches) == (1, 1)
    assert "a" in parts.in_flight, "until Redis has the answer"


def test_batches_in_flight_are_bounded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is scored, one waits for that, and one waits for room: the next one is not launched before."""
    executor, may_score = parts.pipeline._stages.executor, threading.Event()
    finish = executor.finish

    def finish_later(launched: LaunchedBatch) -> None:
        assert may_score.wait(60)
        finish(launched)

    monkeypatch.setattr(executor, "finish", finish_later)
    jobs = make_jobs(*"abcd")
    parts.claims.claimed(jobs)
    for count, job in enumerate(jobs[:3], start=1):
        parts.load(job.id)
        wait_until(lambda expected=count: len(parts.launched) == expected, timeout_s=10)  # type: ignore[misc]  # a default binds the loop's value
    parts.load("d")
    wait_until(parts.pipeline._launched.full, timeout_s=10)
    assert parts.launched == [["a"], ["b"], ["c"]]
    may_score.set()
    assert parts.outcome("d") == Answered(jobs[3])


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_job_that_ends_while_it_waits_is_not_encoded(parts: Parts, *, is_cancelled: bool) -> None:
    """It expires, or is cancelled, between decode and encode: the device never sees it, and its slot is free again."""
    parts.device_free.clear()
    first, ending, other = make_jobs("first", "ending", "other")
    parts.claims.claimed([first, ending, other])
    parts.load("first")
    wait_until(lambda: parts.launched, timeout_s=10)
    parts.load("ending", "other")
    if is_cancelled:
        parts.in_flight.mark_answered_elsewhere(["ending"])
    else:
        ending.expires_s = time.monotonic() - 1.0
    parts.device_free.set()
    outcome = parts.outcome("ending")
    assert parts.outcome("other") == Answered(other)
    assert parts.launched == [["first"], ["other"]]
    if is_cancelled:
        assert outcome == Released(ending, Release("ending"))
        assert ending.error is None
    else:
        assert outcome == Answered(ending)
        assert ending.error is not None
        assert ending.error.code is ErrorCode.EXPIRED
    wait_until(lambda: len(parts.in_flight._free) == SLOTS, timeout_s=10)


def test_job_that_is_still_in_flight_is_deferred(parts: Parts) -> None:
    """Its earlier attempt is being committed: the new one is given back for a moment, and is not loaded."""
    [first], [again] = make_jobs("a"), make_jobs("a")
    parts.claims.claimed([first])
    parts.claims.claimed([again])
    assert parts.outcomes == [Released(again, Release("a", delay_s=STILL_IN_FLIGHT_DELAY_S))]
    assert len(parts.tasks) == 1
    assert parts.in_flight.jobs() == [first]
    parts.pipeline.released([Released(again, Release("a"))])
    assert parts.in_flight.jobs() == [first], "only the attempt that was released is forgotten"
    parts.load("a")
    wait_until(lambda: Answered(first) in parts.outcomes, timeout_s=10)


def test_claimed_job_with_an_obstacle_is_not_loaded(parts: Parts) -> None:
    """An expired one is answered, one whose time has not come is given back until then."""
    now_s = time.monotonic()
    [expired], [early] = make_jobs("expired", expires_s=now_s - 1), make_jobs("early", due_s=now_s + 1000)
    parts.claims.claimed([expired, early])
    assert parts.tasks == []
    assert parts.outcome("expired") == Answered(expired)
    assert expired.error is not None
    assert expired.error.code is ErrorCode.EXPIRED
    outcome = parts.outcome("early")
    assert isinstance(outcome, Released)
    assert 990 < outcome.release.delay_s <= 1000
    assert not outcome.release.counts


def test_failed_load_is_retried_or_answered(parts: Parts) -> None:
    """By the class of its error; no image of it reaches the device. A result without a job is ignored."""
    parts.claims.claimed(make_jobs("away", "broken"))
    parts.load("away", error=ErrorInfo(code=RETRIED, message="503"))
    parts.load("broken", error=BROKEN)
    away, broken = parts.outcome("away"), parts.outcome("broken")
    assert isinstance(away, Released)
    assert away.release.counts
    assert isinstance(broken, Answered)
    assert broken.job.error == BROKEN
    for job_id in ("away", "broken"):
        parts.load(job_id)  # a second result of the same ticket
    assert parts.launched == []
    assert len(parts.outcomes) == 2


def test_answered_and_released_jobs_are_forgotten_and_reported(parts: Parts) -> None:
    """As soon as Redis has them, and not before."""
    one, two = make_jobs("one", "two")
    parts.claims.claimed([one, two])
    committed: Any = SimpleNamespace(job=one)
    parts.pipeline.committed([committed])
    assert parts.in_flight.ids() == ["two"]
    released = Released(two, Release("two"))
    parts.pipeline.released([released])
    assert parts.in_flight.ids() == []
    assert (parts.observer.committed, parts.observer.released) == ([committed], [released])


def test_stop_gives_back_the_youngest_first(parts: Parts) -> None:
    """Released to the front of a lane in this order, jobs keep theirs. No attempt is counted."""
    parts.claims.claimed(make_jobs("a", "b"))
    parts.claims.claimed(make_jobs("c"))
    left = parts.pipeline.stop(grace_s=0.0)
    assert left == [Release(job_id, counts=False, ending="worker_stopped|") for job_id in ("c", "b", "a")]
    assert not any(thread.is_alive for thread in parts.pipeline.threads)


def test_stop_waits_for_jobs_in_flight_until_hurried(parts: Parts) -> None:
    """A second signal ends the grace time; without jobs `stop` does not wait at all."""
    parts.claims.claimed(make_jobs("a"))
    left: list[Release] = []
    stopping = threading.Thread(target=lambda: left.extend(parts.pipeline.stop(grace_s=1000.0)))
    stopping.start()
    stopping.join(0.3)
    assert stopping.is_alive(), "expected the job to have its grace time"
    parts.pipeline.hurry()
    stopping.join(20)
    assert [release.id for release in left] == ["a"]


@pytest.mark.parametrize("exit_code", [ExitCode.DEVICE, ExitCode.CANARY])
def test_only_jobs_on_a_failed_device_are_suspected(parts: Parts, exit_code: ExitCode) -> None:
    """Their attempt counts. After a failed canary none does, because the device is the cause."""
    parts.device_free.clear()
    parts.claims.claimed(make_jobs("loading", "on device"))
    parts.load("on device")
    wait_until(lambda: parts.launched, timeout_s=10)
    parts.launch_error = FatalError(exit_code, "the device failed")
    parts.device_free.set()
    wait_until(lambda: parts.fatal, timeout_s=10)
    assert [error.exit_code for error in parts.fatal] == [exit_code]
    assert parts.claims.reports[-1:] == [False]
    is_device = exit_code is ExitCode.DEVICE
    assert parts.pipeline.stop(grace_s=0.0) == [
        Release("on device", counts=is_device, ending="worker_lost|" if is_device else "worker_stopped|"),
        Release("loading", counts=False, ending="worker_stopped|"),
    ]


def test_failed_canary_ends_the_process_before_a_batch(parts: Parts) -> None:
    """It is checked between two batches; a batch that waits is not sent to a device that computes wrong results."""
    parts.canary_error = FatalError(ExitCode.CANARY, "wrong")
    wait_until(lambda: parts.fatal, timeout_s=10)
    parts.claims.claimed(make_jobs("a"))
    parts.load("a")
    assert parts.launched == []


def test_encode_thread_shows_its_age(parts: Parts) -> None:
    """An idle thread begins rounds; one that waits for the device does not."""
    parts.device_free.clear()
    parts.claims.claimed(make_jobs("a"))
    parts.load("a")
    wait_until(lambda: parts.launched, timeout_s=10)
    wait_until(lambda: parts.pipeline.encode_age_s() > 1.2, timeout_s=20)
    parts.device_free.set()
    wait_until(lambda: parts.pipeline.encode_age_s() < 1.2, timeout_s=20)
