"""Jobs with the same image: one is encoded, the others get its vector, and no failure is shared."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shiwu.contract import Cache, ErrorCode, ErrorInfo, Lane
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.outcome import Answered, Released
from shiwu_worker.loaders.shared_memory import KnownImages
from shiwu_worker.pipeline.known_files import KnownFile, KnownFiles
from shiwu_worker.pipeline.shared_images import SharedImages
from shiwu_worker.stages.fetch.validators import Validator
from tests.support.pipeline_stubs import Parts, make_jobs
from tests.support.waiting import wait_until

SAME = "5a" * 32


@pytest.fixture(params=[0, 2], ids=["nothing-kept", "two-kept"])
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    """A pipeline that runs, and is stopped after the test."""
    made = Parts(max_vectors=request.param)
    made.pipeline.start()
    made.claims.wait_running()
    yield made
    made.device_free.set()
    made.pipeline.stop(grace_s=0.0)


def busy(parts: Parts) -> None:
    """Let the device be busy with another image, so that the next ones wait for it."""
    parts.device_free.clear()
    parts.claims.claimed(make_jobs("busy"))
    parts.load("busy")
    wait_until(lambda: parts.launched == [["busy"]], timeout_s=10)


def test_jobs_with_one_image_share_one_row(parts: Parts) -> None:
    """Also those that come while it is on the device. Each has its own slot, and its vector is that of the leader."""
    busy(parts)
    first, second, third = make_jobs("first", "second", "third")
    parts.claims.claimed([first, second])
    parts.load("first", "second", sha256=SAME)
    parts.device_free.set()
    assert parts.outcome("first") == Answered(first)
    assert parts.outcome("second") == Answered(second)
    assert parts.launched == [["busy"], ["first"]]
    assert (first.cache, second.cache) == (None, Cache.JOINED)
    assert second.shared_vector is not None
    assert second.shared_vector.tolist() == parts.vector_of("first")
    assert second.moments.encode_from_s == second.moments.score_from_s > 0
    wait_until(lambda: parts.observer.saved == {"joined": 1}, timeout_s=10)
    parts.claims.claimed([third])
    parts.load("third", sha256=SAME)
    assert parts.outcome("third") == Answered(third)
    if parts.max_vectors:
        assert (third.cache, len(parts.launched)) == (Cache.VECTOR, 2)
        assert third.shared_vector is not None
        assert third.shared_vector.tolist() == parts.vector_of("first")
    else:
        assert (third.cache, len(parts.launched)) == (None, 3)
    wait_until(lambda: len(parts.in_flight._free) == parts.slots, timeout_s=10)


def test_recognised_job_gets_the_facts_of_the_image(parts: Parts) -> None:
    """Its loader has not decoded it: format and size come from the job that has, the reference is its own."""
    busy(parts)
    first, second = make_jobs("first", "second")
    parts.claims.claimed([first, second])
    parts.load("first", sha256=SAME)
    parts.recognise("second", sha256=SAME)
    parts.device_free.set()
    assert parts.outcome("second") == Answered(second)
    assert second.image == first.image
    assert not second.has_pixels


def test_image_that_is_known_no_more_is_loaded_again(parts: Parts) -> None:
    """The loader must then decode it; the job goes through the batch as any other."""
    [job] = make_jobs("a")
    parts.known_images.note(SAME)
    parts.claims.claimed([job])
    parts.recognise("a", sha256=SAME)
    assert [task.has_to_be_decoded for task in parts.tasks] == [False, True]
    assert parts.tasks[1].slot == job.slot
    assert SAME not in parts.known_images
    parts.load("a", sha256=SAME)
    assert parts.outcome("a") == Answered(job)
    assert (parts.launched, job.cache) == ([["a"]], None)


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["expired", "cancelled"])
@pytest.mark.parametrize("is_recognised", [False, True], ids=["own-pixels", "no-pixels"])
def test_follower_takes_the_place_of_a_leader_that_ends(
    parts: Parts, *, is_cancelled: bool, is_recognised: bool
) -> None:
    """With the leader's pixels, where it has none; a follower that has ended too is passed over."""
    busy(parts)
    leader, ended, successor, last = jobs = make_jobs("leader", "ended", "successor", "last")
    parts.claims.claimed(jobs)
    slot = leader.slot
    parts.load("leader", sha256=SAME)
    for name in ("ended", "successor", "last"):
        (parts.recognise if is_recognised else parts.load)(name, sha256=SAME)
    for job in (leader, ended):
        if is_cancelled:
            parts.in_flight.mark_answered_elsewhere([job.id])
        else:
            job.expires_s = time.monotonic() - 1.0
    parts.device_free.set()
    assert [parts.outcome(job.id) for job in (successor, last)] == [Answered(successor), Answered(last)]
    assert parts.launched == [["busy"], ["successor"]]
    assert (successor.slot == slot) is is_recognised
    assert (successor.cache, last.cache) == (None, Cache.JOINED)
    for job in (leader, ended):
        outcome = parts.outcome(job.id)
        assert isinstance(outcome, Released if is_cancelled else Answered)
        assert is_cancelled or (job.error is not None and job.error.code is ErrorCode.EXPIRED)
        assert job.cache is None
    wait_until(lambda: sorted(parts.in_flight._free) == list(range(parts.slots)), timeout_s=10)


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["expired", "cancelled"])
def test_follower_that_ends_leaves_its_leader(parts: Parts, *, is_cancelled: bool) -> None:
    """Its attempt ends without a score; the leader and the other followers are answered."""
    busy(parts)
    leader, ending, other = jobs = make_jobs("leader", "ending", "other")
    parts.claims.claimed(jobs)
    parts.load("leader", "ending", "other", sha256=SAME)
    if is_cancelled:
        parts.in_flight.mark_answered_elsewhere(["ending"])
    else:
        ending.expires_s = time.monotonic() - 1.0
    parts.device_free.set()
    assert [parts.outcome(job.id) for job in (leader, other)] == [Answered(leader), Answered(other)]
    outcome = parts.outcome("ending")
    assert isinstance(outcome, Released if is_cancelled else Answered)
    wait_until(lambda: parts.observer.saved == {"joined": 1}, timeout_s=10)


def test_error_of_a_leader_is_not_shared(parts: Parts) -> None:
    """Each follower is tried by itself, and no vector is kept of a failure."""
    busy(parts)
    jobs = make_jobs("leader", "second", "third")
    third = jobs[-1]
    parts.claims.claimed(jobs)
    parts.load("leader", sha256=SAME)
    parts.recognise("second", sha256=SAME)
    parts.recognise("third", sha256=SAME)
    parts.encode_errors = {name: ErrorInfo(code=ErrorCode.ENCODE_FAILED, message="no") for name in ("leader", "second")}
    parts.device_free.set()
    outcomes = [parts.outcome(job.id) for job in jobs]
    assert outcomes == [Answered(job) for job in jobs]
    assert parts.launched == [["busy"], ["leader"], ["second"], ["third"]]
    assert [job.error is None for job in jobs] == [False, False, True]
    assert third.cache is None
    assert len(parts.shared) == parts.max_vectors, "the vectors of the busy image and of the third job, if any"


def test_interactive_follower_hurries_its_leader(parts: Parts) -> None:
    """A leader from bulk then goes before other bulk images."""
    busy(parts)
    bulk = make_jobs("b1", "b2", "b3", key=Lane.BULK.queue)
    [urgent] = make_jobs("urgent")
    parts.claims.claimed(bulk)
    parts.load("b1", "b2", sha256="")
    parts.load("b3", sha256=SAME)
    parts.claims.claimed([urgent])
    parts.recognise("urgent", sha256=SAME)
    parts.device_free.set()
    assert parts.outcome("urgent") == Answered(urgent)
    wait_until(lambda: len(parts.launched) >= 2, timeout_s=10)
    assert parts.launched[1][0] == "b3"


def test_followers_of_a_leader_on_a_failed_device_are_suspected(parts: Parts) -> None:
    """Each of them would bring the same image to a device again."""
    parts.device_free.clear()
    parts.claims.claimed(make_jobs("leader", "follower"))
    parts.load("leader", sha256=SAME)
    wait_until(lambda: parts.launched, timeout_s=10)
    parts.load("follower", sha256=SAME)
    parts.launch_error = FatalError(ExitCode.DEVICE, "the device failed")
    parts.device_free.set()
    wait_until(lambda: parts.fatal, timeout_s=10)
    assert {release.id: release.counts for release in parts.pipeline.stop(grace_s=0.0)} == {
        "leader": True,
        "follower": True,
    }


def test_failed_canary_empties_the_cache(parts: Parts) -> None:
    """The vectors of a device that computes wrong results are not used again, not even until the process ends."""
    [first, second] = make_jobs("first", "second")
    parts.claims.claimed([first])
    parts.load("first", sha256=SAME)
    assert parts.outcome("first") == Answered(first)
    parts.claims.claimed([second])
    parts.canary_error = FatalError(ExitCode.CANARY, "wrong")
    wait_until(lambda: parts.fatal, timeout_s=10)
    assert len(parts.shared) == 0
    parts.recognise("second", sha256=SAME)
    assert [outcome.job.id for outcome in parts.outcomes] == ["first"]
    assert parts.tasks[-1].has_to_be_decoded


def test_file_is_known_while_its_vector_is_kept(parts: Parts) -> None:
    """Then its source need not send it again; the answer has the facts of the image all the same."""
    validator = Validator('"v1"', "a" * 32)
    first, second, third = make_jobs("first", "second", "third")
    parts.claims.claimed([first])
    parts.load("first", sha256=SAME, validator=validator)
    assert parts.outcome("first") == Answered(first)
    parts.claims.claimed([second])
    if not parts.max_vectors:
        assert parts.tasks[-1].validator is None
        return
    assert (parts.tasks[-1].validator, parts.tasks[-1].sha256) == (validator, SAME)
    parts.recognise("second", sha256=SAME, is_modified=False)
    assert parts.outcome("second") == Answered(second)
    assert (second.cache, second.image) == (Cache.VECTOR, first.image)
    wait_until(lambda: parts.observer.saved == {"not_modified": 1}, timeout_s=10)
    parts.claims.claimed([third])
    parts.shared._kept.clear()
    parts.recognise("third", sha256=SAME, is_modified=False)
    assert parts.tasks[-1].has_to_be_decoded
    assert parts.tasks[-1].validator is None
    parts.load("third", sha256=SAME)
    assert parts.outcome("third") == Answered(third)
    assert third.cache is None


def test_files_are_known_by_their_whole_reference() -> None:
    """Two signatures of one URL are two references; the oldest is forgotten first."""
    files = KnownFiles(2)
    known = [KnownFile(Validator(f'"{number}"', "a" * 32), SAME) for number in range(3)]
    for number, file in enumerate(known):
        files.note(f"https://h/p?signature={number}", file)
    assert [files.find(f"https://h/p?signature={number}") for number in range(3)] == [None, known[1], known[2]]
    assert files.find("https://h/p") is None
    files.note("https://h/p?signature=1", known[0])
    files.note("https://h/p?signature=3", known[0])
    assert files.find("https://h/p?signature=1") == known[0]
    assert len(files) == 2


def test_every_job_is_computed_by_itself_where_sharing_is_off() -> None:
    """As a measurement needs it."""
    shared = SharedImages(max_vectors=0, known_images=KnownImages(np.zeros(0, np.uint64)), is_on=False)
    jobs = make_jobs("a", "b")
    for job in jobs:
        job.sha256, job.has_pixels = SAME, True
    for _ in range(2):
        assert shared.sort(jobs).to_encode == jobs
        shared.encoded(jobs, np.zeros((2, 1), np.float32))
    assert shared.take_answerable() == []


def test_many_threads_share_ten_images_in_ten_rows() -> None:
    """A thousand jobs that threads load at the same time, while another one encodes: each image is encoded once."""
    shared = SharedImages(max_vectors=100, known_images=KnownImages(np.zeros(1024, np.uint64)))
    encoded: list[Any] = []
    answered: list[Any] = []
    has_loaded = threading.Event()
    waiting: list[Any] = []

    def load(part: int) -> None:
        jobs = make_jobs(*(f"{part}-{number}" for number in range(250)))
        for number, job in enumerate(jobs):
            job.sha256, job.has_pixels = f"{number % 10:064x}", True
            found = shared.sort([job])
            answered.extend(found.known)
            waiting.extend(found.to_encode)

    def encode() -> None:
        while not (has_loaded.is_set() and not waiting):
            batch = [waiting.pop() for _ in range(len(waiting))]
            if batch:
                encoded.extend(batch)
                shared.encoded(batch, np.array([[int(job.sha256, 16)] for job in batch], np.float32))
                answered.extend(shared.take_answerable())

    encoding = threading.Thread(target=encode)
    loading = [threading.Thread(target=load, args=(part,)) for part in range(4)]
    for thread in (encoding, *loading):
        thread.start()
    for thread in loading:
        thread.join(30)
    has_loaded.set()
    encoding.join(30)
    answered.extend(shared.take_answerable())
    assert len(encoded) == 10
    assert len(answered) == 990
    assert all(job.shared_vector.tolist() == [int(job.sha256, 16)] for job in answered)
