"""The label queue: labels in portions, lanes with shares, and no cost for jobs whose labels are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shiwu.contract import ErrorCode, Lane
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels
from shiwu_worker.pipeline.admission import Admit, Reject
from shiwu_worker.pipeline.label_queue import MAX_TEXTS
from tests.support.label_queues import CONFIGURED, LIMITS, TEXT_S, QueueParts, make_job, words


def test_known_labels_are_admitted_without_waiting() -> None:
    """A cached set costs nothing, also one that differs in its head only."""
    parts = QueueParts()
    label_set = words(3)
    parts.bank.encoded(label_set)
    parts.tower.texts.clear()
    assert parts.admit(label_set).labels is not None
    assert parts.admit(replace(label_set, head="sigmoid")).labels is not None
    assert (len(parts.queue), parts.queue.wait_s(is_idle=True), parts.tower.texts) == (0, None, [])


def test_new_labels_are_encoded_in_short_portions() -> None:
    """A thousand labels take a second: no portion takes much more than its aim, and the job goes on after the last."""
    parts = QueueParts()
    job = parts.admit(words(1000))
    took_s = []
    while len(parts.queue):
        ready, portion_s = parts.portion()
        took_s.append(portion_s)
    assert ready == [job]
    assert job.labels is not None
    assert job.labels.label_set.words == job.label_set.words if job.label_set else ()
    assert max(took_s) <= LIMITS.portion_s * 1.01
    assert len(took_s) == pytest.approx(1000 * TEXT_S / LIMITS.portion_s, rel=0.2)
    assert sum(words_done for _, words_done in parts.observer.labels) == 1000


def test_portion_may_take_as_long_as_the_smallest_batch() -> None:
    """Where an image takes longer than the aim, a portion of that length delays nothing much."""
    parts = QueueParts()
    parts.image_s = 0.1
    parts.admit(words(1000))
    assert parts.portion()[1] == pytest.approx(0.1, rel=0.05)


def test_interactive_labels_go_before_bulk_labels() -> None:
    """Ten large bulk sets wait: an interactive job with three labels goes on after the next portion."""
    parts = QueueParts()
    bulk = [parts.admit(words(1000)) for _ in range(10)]
    parts.portion()
    job = parts.admit(words(3), Lane.INTERACTIVE)
    assert parts.portion()[0] == [job]
    assert len(parts.queue) == len(bulk)


def test_interactive_job_takes_a_waiting_bulk_set_along() -> None:
    """A set that a bulk job waits for becomes urgent when an interactive job needs it too; both go on together."""
    parts = QueueParts()
    parts.admit(words(1000))
    shared = words(5)
    first = parts.admit(shared)
    second = parts.admit(shared, Lane.INTERACTIVE)
    assert parts.queue.words_waiting()[Lane.INTERACTIVE] == 5
    assert parts.portion()[0] == [first, second]
    assert first.labels is second.labels


def test_jobs_with_equal_labels_wait_for_one_encoding() -> None:
    """Twelve jobs with the same new labels: the labels are encoded once, and all jobs share one object."""
    parts = QueueParts()
    label_set = words(30)
    jobs = [parts.admit(LabelSet(None, label_set.words)) for _ in range(12)]
    assert parts.finish() == jobs
    assert sorted(parts.tower.texts) == sorted(label_set.words)
    assert len({id(job.labels) for job in jobs}) == 1


def test_jobs_that_have_their_labels_are_not_kept() -> None:
    """A worker runs for months."""
    parts = QueueParts()
    label_set = words(30)
    jobs = [parts.admit(label_set) for _ in range(3)]
    assert parts.finish() == jobs
    assert not parts.queue._loaded
    assert not parts.queue._waiting


def test_short_set_passes_a_long_one_which_still_advances() -> None:
    """The oldest and the shortest entry take turns."""
    parts = QueueParts()
    long = parts.admit(words(100))
    short = [parts.admit(words(15)) for _ in range(10)]
    order = parts.finish()
    assert order.index(short[0]) < order.index(long) < order.index(short[-1])


def test_request_that_is_too_dear_is_rejected() -> None:
    """Only its new labels count, and only those of requests: the operator's sets may take any time."""
    parts = QueueParts(limits=replace(LIMITS, max_request_s=0.05), sets=[CONFIGURED])
    decision = parts.queue.admit(make_job(Lane.BULK), words(100))
    assert isinstance(decision, Reject)
    assert decision.error.code is ErrorCode.LABELS_TOO_COSTLY
    assert "within 0.05 s, got 100 labels" in decision.error.message
    known = words(100)
    parts.bank.encoded(known)
    parts.admit(LabelSet(None, (*known.words, "one more")))
    parts.admit(CONFIGURED)


def test_unwanted_jobs_leave_and_cost_nothing() -> None:
    """Cancelled or expired, loaded or not: their labels are not encoded, and the loaded ones are returned."""
    parts = QueueParts()
    cancelled = parts.admit(words(50))
    expired = make_job(Lane.BULK, expires_s=10.0)
    parts.queue.admit(expired, words(50))
    kept = parts.admit(words(2))
    cancelled.is_answered_elsewhere = True
    assert parts.queue.drop_unwanted(now_s=11.0) == [cancelled]
    assert parts.queue.loaded([expired]) == [expired]
    assert parts.finish() == [kept]
    assert len(parts.tower.texts) == 2


def test_job_whose_image_fails_leaves_its_set_to_the_others() -> None:
    """With the last job of a set its labels leave too."""
    parts = QueueParts()
    label_set = words(50)
    first, second = parts.admit(label_set), parts.admit(label_set)
    parts.queue.discard([first])
    assert parts.queue.words_waiting()[Lane.BULK] == 50
    parts.queue.discard([second])
    assert parts.queue.words_waiting()[Lane.BULK] == 0
    assert parts.finish() == []


def test_labels_that_fail_fail_only_their_own_jobs() -> None:
    """An error of the text tower is the error of the jobs that wait for these labels."""
    parts = QueueParts()
    bad, good = words(3), words(3)
    parts.tower.errors[bad.words[1]] = ValueError("a kernel failed")
    jobs = [parts.admit(bad), parts.admit(good), parts.admit(bad)]
    assert {job.id for job in parts.finish()} == {job.id for job in jobs}
    codes = [job.error and job.error.code for job in jobs]
    assert codes == [ErrorCode.ENCODE_FAILED, None, ErrorCode.ENCODE_FAILED]
    assert jobs[1].labels is not None


def test_image_that_is_loaded_after_its_labels_failed_goes_on() -> None:
    """Its job is in no queue any more and has the error; the loaders' thread ends its attempt."""
    parts = QueueParts()
    bad = words(1)
    parts.tower.errors[bad.words[0]] = MemoryError("OUT_OF_MEMORY")
    job = make_job(Lane.BULK)
    parts.queue.admit(job, bad)
    assert parts.portion()[0] == []
    assert parts.queue.loaded([job]) == [job]
    assert job.error is not None
    assert (job.error.code, job.error.retryable) == (ErrorCode.OUT_OF_MEMORY, True)


def test_device_lost_on_labels_suspects_their_jobs_only() -> None:
    """The process ends, and the jobs of these labels count as on the device."""
    parts = QueueParts()
    bad = words(1)
    parts.tower.errors[bad.words[0]] = RuntimeError("LOST")
    job, other = parts.admit(bad), parts.admit(words(100))
    with pytest.raises(FatalError) as caught:
        parts.finish()
    assert caught.value.exit_code is ExitCode.DEVICE
    assert (job.is_on_device, other.is_on_device) == (True, False)


def test_configured_sets_are_encoded_while_the_device_is_idle() -> None:
    """Not while images wait, and after the labels of all jobs; a job that needs the set makes it urgent."""
    parts = QueueParts(sets=[CONFIGURED])
    assert parts.queue.wait_s(is_idle=False) is None
    assert parts.portion(is_idle=False) == ([], 0.0)
    parts.admit(words(3))
    parts.portion()
    assert parts.observer.labels == [(Lane.BULK, 3)]
    job = parts.admit(CONFIGURED, Lane.INTERACTIVE)
    assert parts.queue.wait_s(is_idle=False) == 0.0
    parts.queue.discard([job])
    assert parts.queue.wait_s(is_idle=False) is None
    parts.finish()
    assert parts.bank.known(CONFIGURED) is not None


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "again", "portion", "busy", "cancel"]), st.integers(1, 60), st.booleans()),
    max_size=40,
)


@given(ACTIONS)
def test_every_job_leaves_once_with_labels_or_unwanted(actions: list[tuple[str, int, bool]]) -> None:
    """In whatever order jobs come, go and are cancelled, and no portion is longer than its aim."""
    parts = QueueParts()
    left: list[Job] = []
    admitted: list[Job] = []
    sets = [words(1)]
    for action, size, is_interactive in actions:
        lane = Lane.INTERACTIVE if is_interactive else Lane.BULK
        if action in {"admit", "again"}:
            sets += [words(size)] if action == "admit" else []
            job = make_job(lane)
            decision = parts.queue.admit(job, sets[size % len(sets)])
            if isinstance(decision, Admit):
                admitted.append(job)
                job.labels = job.labels or decision.labels
                left += parts.queue.loaded([job])
        elif action == "cancel" and admitted:
            admitted[size % len(admitted)].is_answered_elsewhere = True
            left += parts.queue.drop_unwanted(parts.clock.now_s)
        else:
            ready, took_s = parts.portion(is_idle=action == "portion")
            left += ready
            assert took_s <= LIMITS.portion_s * 1.01
    left += parts.finish()
    assert sorted(job.id for job in left) == sorted(job.id for job in admitted)
    assert all(job.labels is not None or job.is_answered_elsewhere for job in left)
    assert (len(parts.queue), set(parts.queue.words_waiting().values())) == (0, {0})


@pytest.mark.parametrize(("templates", "texts"), [(1, MAX_TEXTS), (2, MAX_TEXTS // 2), (3, MAX_TEXTS // 3)])
def test_portion_has_a_bound_of_texts(templates: int, texts: int) -> None:
    """However long a batch of images takes: each label makes a text with each template."""
    parts = QueueParts(limits=replace(LIMITS, max_request_s=1e6))
    parts.image_s = 1e6
    label_set = replace(words(300), templates=tuple(f"{number} {{}}" for number in range(templates)))
    parts.admit(label_set)
    parts.portion()
    assert parts.observer.labels == [(Lane.BULK, texts)]
    assert parts.queue.words_waiting()[Lane.BULK] == 300 - texts


def test_portion_has_at_least_one_label() -> None:
    """Also where one alone takes longer than the aim; the shortest labels come first."""
    parts = QueueParts(limits=replace(LIMITS, portion_s=1e-9))
    job = make_job(Lane.BULK)
    parts.queue.admit(job, LabelSet(None, ("a much longer label", "short", "in between")))
    for expected in ("short", "in between", "a much longer label"):
        parts.tower.texts.clear()
        parts.portion()
        assert parts.tower.texts == [expected]
    assert job.labels is not None
    assert len(parts.queue) == 0


def test_jobs_with_other_heads_get_their_own_label_sets() -> None:
    """The labels are encoded once; each job has the vectors under the set that it named."""
    parts = QueueParts()
    plain = words(3)
    other = replace(plain, head="sigmoid")
    jobs = [parts.admit(plain), parts.admit(other)]
    assert [job.label_set for job in jobs] == [plain, other]
    parts.finish()
    assert len(parts.tower.texts) == 3
    for job, label_set in zip(jobs, (plain, other), strict=True):
        assert job.labels is not None
        assert job.labels.label_set == label_set


def test_jobs_are_on_the_device_while_their_labels_are() -> None:
    """And no longer, also where the labels failed: an error of another job must not count for them."""
    parts = QueueParts()
    label_set, bad = words(2), words(1)
    job = parts.admit(label_set)
    seen: list[bool] = []
    encode = parts.tower.encode

    def note(texts: Sequence[str]) -> NDArray[np.float32]:
        seen.append(job.is_on_device)
        return encode(texts)

    parts.bank._encode_texts = note
    parts.finish()
    assert (seen, job.is_on_device) == ([True], False)
    parts.tower.errors[bad.words[0]] = ValueError("a kernel failed")
    failing = parts.admit(bad)
    parts.finish()
    assert not failing.is_on_device
    assert failing.error is not None
    assert failing.error.retryable is False


def test_set_is_encoded_ahead_of_its_jobs_while_images_wait() -> None:
    """At the share of bulk jobs, whether or not a job comes for it meanwhile."""
    parts = QueueParts()
    label_set = LabelSet("new", tuple(f"n{number}" for number in range(200)))
    ended: list[object] = []
    parts.queue.encode_ahead(label_set, ended.append)
    for _ in range(1000):
        if ended:
            break
        parts.queue.run_portion(is_idle=False)
        parts.clock.now_s += 0.01
    assert [each.label_set for each in ended if isinstance(each, EncodedLabels)] == [label_set]
    assert {lane for lane, _ in parts.observer.labels} == {Lane.BULK}
    parts.queue.encode_ahead(label_set, ended.append)
    assert len(ended) == 2, "a set that is known needs no queue"
