"""The label queue: labels in portions, lanes with shares, and no cost for jobs whose labels are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shiwu.contract import ErrorCode, Lane
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.pipeline.admission import Admit, Defer, Reject
from shiwu_worker.pipeline.label_queue import LONGEST_DELAY_S, MAX_TEXTS, SHORTEST_DELAY_S, LabelQueue
from shiwu_worker.policy.limits import LabelLimits
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support.clock import Clock
from tests.support.observers import RecordingObserver

TEXT_S = 0.001
LIMITS = LabelLimits()
CONFIGURED = LabelSet("mine", tuple(f"k{number:03}" for number in range(100)))
numbers = itertools.count()


class Tower:
    """A text tower that takes TEXT_S for each text, by the clock of the test."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.texts: list[str] = []
        self.errors: dict[str, Exception] = {}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Take the time of these texts."""
        self.clock.now_s += TEXT_S * len(texts)
        for text in texts:
            if text in self.errors:
                raise self.errors[text]
        self.texts += texts
        return np.stack([np.array([1.0, len(self.texts)], np.float32) for _ in texts])

    def tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """A token for each letter."""
        return [LabelTokens(tuple(map(ord, label)), is_readable=True) for label in labels]


class Place:
    """A label queue over a label bank, with a clock that only the tower moves."""

    def __init__(self, *, limits: LabelLimits = LIMITS, sets: Sequence[LabelSet] = ()) -> None:
        self.clock = Clock()
        self.tower = Tower(self.clock)
        self.observer = RecordingObserver()
        self.image_s = 0.0
        self.bank = LabelBank(
            sets={str(label_set.name): label_set for label_set in sets},
            default="",
            encode_texts=self.tower.encode,
            label_tokens=self.tower.tokens,
            max_cached=100,
            has_bias=True,
            clock=self.clock.monotonic,
        )
        self.bank.encoded(words(100))
        self.tower.texts.clear()
        self.queue = LabelQueue(
            self.bank,
            limits,
            error_kind=self._kind,
            image_s=lambda: self.image_s,
            observer=self.observer,
            clock=self.clock.monotonic,
        )

    @staticmethod
    def _kind(error: BaseException) -> DeviceErrorKind:
        return DeviceErrorKind[str(error)] if str(error) in DeviceErrorKind.__members__ else DeviceErrorKind.OTHER

    def admit(self, label_set: LabelSet, lane: Lane = Lane.BULK) -> Job:
        """Admit a job that has room, and note that its image is loaded."""
        job = make_job(lane)
        decision = self.queue.admit(job, label_set)
        assert isinstance(decision, Admit)
        job.label_set, job.labels = decision.label_set, decision.labels
        if job.labels is None:
            assert self.queue.loaded([job]) == []
        return job

    def portion(self, *, is_idle: bool = True) -> tuple[list[Job], float]:
        """Run a portion; return the jobs that can go on, and how long it took."""
        began_s = self.clock.now_s
        return self.queue.run_portion(is_idle=is_idle), self.clock.now_s - began_s

    def finish(self) -> list[Job]:
        """Run portions until nothing is left; return the jobs in the order in which they could go on."""
        found: list[Job] = []
        while self.queue.wait_s(is_idle=True) is not None:
            found += self.portion()[0]
        return found


def make_job(lane: Lane, *, expires_s: float | None = None) -> Job:
    """A job that was claimed."""
    moments = StageTimestamps(claimed_s=0.0)
    return Job(id=f"j{next(numbers)}", key=lane.queue, attempt=1, raw=b"", moments=moments, expires_s=expires_s)


def words(count: int) -> LabelSet:
    """New labels of equal length."""
    first = next(numbers) * 10_000
    return LabelSet(None, tuple(f"w{first + number:09}" for number in range(count)))


def test_known_labels_are_admitted_without_waiting() -> None:
    """A cached set costs nothing, also one that differs in its head only."""
    place = Place()
    label_set = words(3)
    place.bank.encoded(label_set)
    place.tower.texts.clear()
    assert place.admit(label_set).labels is not None
    assert place.admit(replace(label_set, head="sigmoid")).labels is not None
    assert (len(place.queue), place.queue.wait_s(is_idle=True), place.tower.texts) == (0, None, [])


def test_new_labels_are_encoded_in_short_portions() -> None:
    """A thousand labels take a second: no portion takes much more than its aim, and the job goes on after the last."""
    place = Place()
    job = place.admit(words(1000))
    took_s = []
    while len(place.queue):
        ready, portion_s = place.portion()
        took_s.append(portion_s)
    assert ready == [job]
    assert job.labels is not None
    assert job.labels.label_set.words == job.label_set.words if job.label_set else ()
    assert max(took_s) <= LIMITS.portion_s * 1.01
    assert len(took_s) == pytest.approx(1000 * TEXT_S / LIMITS.portion_s, rel=0.2)
    assert sum(words_done for _, words_done in place.observer.labels) == 1000


def test_portion_may_take_as_long_as_the_smallest_batch() -> None:
    """Where an image takes longer than the aim, a portion of that length delays nothing much."""
    place = Place()
    place.image_s = 0.1
    place.admit(words(1000))
    assert place.portion()[1] == pytest.approx(0.1, rel=0.05)


def test_interactive_labels_go_before_bulk_labels() -> None:
    """Ten large bulk sets wait: an interactive job with three labels goes on after the next portion."""
    place = Place()
    bulk = [place.admit(words(1000)) for _ in range(10)]
    place.portion()
    job = place.admit(words(3), Lane.INTERACTIVE)
    assert place.portion()[0] == [job]
    assert len(place.queue) == len(bulk)


def test_interactive_job_takes_a_waiting_bulk_set_along() -> None:
    """A set that a bulk job waits for becomes urgent when an interactive job needs it too; both go on together."""
    place = Place()
    place.admit(words(1000))
    shared = words(5)
    first = place.admit(shared)
    second = place.admit(shared, Lane.INTERACTIVE)
    assert place.queue.words_waiting()[Lane.INTERACTIVE] == 5
    assert place.portion()[0] == [first, second]
    assert first.labels is second.labels


def test_bulk_labels_keep_to_their_share_while_images_wait() -> None:
    """Of the encode thread's time they get a fifth; an idle device encodes without pauses."""
    place = Place()
    place.admit(words(1000))
    began_s, spent_s = place.clock.now_s, 0.0
    for _ in range(20):
        assert place.queue.wait_s(is_idle=False) == 0.0
        spent_s += place.portion(is_idle=False)[1]
        wait_s = place.queue.wait_s(is_idle=False)
        assert wait_s is not None
        assert wait_s > 0
        assert place.portion(is_idle=False) == ([], 0.0)
        assert place.queue.wait_s(is_idle=True) == 0.0
        place.clock.now_s += wait_s + 1e-9
    assert spent_s / (place.clock.now_s - began_s) == pytest.approx(LIMITS.bulk_share, rel=0.05)


def test_jobs_with_equal_labels_wait_for_one_encoding() -> None:
    """Twelve jobs with the same new labels: the labels are encoded once, and all jobs share one object."""
    place = Place()
    label_set = words(30)
    jobs = [place.admit(LabelSet(None, label_set.words)) for _ in range(12)]
    assert place.finish() == jobs
    assert sorted(place.tower.texts) == sorted(label_set.words)
    assert len({id(job.labels) for job in jobs}) == 1


def test_short_set_passes_a_long_one_which_still_advances() -> None:
    """The oldest and the shortest entry take turns."""
    place = Place()
    long = place.admit(words(100))
    short = [place.admit(words(15)) for _ in range(10)]
    order = place.finish()
    assert order.index(short[0]) < order.index(long) < order.index(short[-1])


def test_request_that_is_too_dear_is_rejected() -> None:
    """Only its new labels count, and only those of requests: the operator's sets may take any time."""
    place = Place(limits=replace(LIMITS, max_request_s=0.05), sets=[CONFIGURED])
    decision = place.queue.admit(make_job(Lane.BULK), words(100))
    assert isinstance(decision, Reject)
    assert decision.error.code is ErrorCode.LABELS_TOO_COSTLY
    assert "within 0.05 s, got 100 labels" in decision.error.message
    known = words(100)
    place.bank.encoded(known)
    place.admit(LabelSet(None, (*known.words, "one more")))
    place.admit(CONFIGURED)


def test_full_queue_gives_jobs_back_without_an_attempt() -> None:
    """Beyond the bound of its lane a job is deferred; the other lane has room of its own."""
    place = Place()
    for _ in range(LIMITS.jobs_per_lane):
        place.admit(words(1000))
    decision = place.queue.admit(make_job(Lane.BULK), words(1))
    assert isinstance(decision, Defer)
    assert SHORTEST_DELAY_S <= decision.delay_s <= LONGEST_DELAY_S
    assert len(place.queue) == LIMITS.jobs_per_lane
    place.admit(words(1000), Lane.INTERACTIVE)


def test_quick_labels_are_not_deferred() -> None:
    """Many jobs with few new labels wait for a moment only, so they are not sent back to Redis."""
    place = Place()
    jobs = [place.admit(words(2)) for _ in range(4 * LIMITS.jobs_per_lane)]
    assert sorted(job.id for job in place.finish()) == sorted(job.id for job in jobs)


def test_unwanted_jobs_leave_and_cost_nothing() -> None:
    """Cancelled or expired, loaded or not: their labels are not encoded, and the loaded ones are returned."""
    place = Place()
    cancelled = place.admit(words(50))
    expired = make_job(Lane.BULK, expires_s=10.0)
    place.queue.admit(expired, words(50))
    kept = place.admit(words(2))
    cancelled.is_answered_elsewhere = True
    assert place.queue.drop_unwanted(now_s=11.0) == [cancelled]
    assert place.queue.loaded([expired]) == [expired]
    assert place.finish() == [kept]
    assert len(place.tower.texts) == 2


def test_job_whose_image_fails_leaves_its_set_to_the_others() -> None:
    """With the last job of a set its labels leave too."""
    place = Place()
    label_set = words(50)
    first, second = place.admit(label_set), place.admit(label_set)
    place.queue.discard([first])
    assert place.queue.words_waiting()[Lane.BULK] == 50
    place.queue.discard([second])
    assert place.queue.words_waiting()[Lane.BULK] == 0
    assert place.finish() == []


def test_labels_that_fail_fail_only_their_own_jobs() -> None:
    """An error of the text tower is the error of the jobs that wait for these labels."""
    place = Place()
    bad, good = words(3), words(3)
    place.tower.errors[bad.words[1]] = ValueError("a kernel failed")
    jobs = [place.admit(bad), place.admit(good), place.admit(bad)]
    assert {job.id for job in place.finish()} == {job.id for job in jobs}
    codes = [job.error and job.error.code for job in jobs]
    assert codes == [ErrorCode.ENCODE_FAILED, None, ErrorCode.ENCODE_FAILED]
    assert jobs[1].labels is not None


def test_image_that_is_loaded_after_its_labels_failed_goes_on() -> None:
    """Its job is in no queue any more and has the error; the loaders' thread ends its attempt."""
    place = Place()
    bad = words(1)
    place.tower.errors[bad.words[0]] = MemoryError("OUT_OF_MEMORY")
    job = make_job(Lane.BULK)
    place.queue.admit(job, bad)
    assert place.portion()[0] == []
    assert place.queue.loaded([job]) == [job]
    assert job.error is not None
    assert (job.error.code, job.error.retryable) == (ErrorCode.OUT_OF_MEMORY, True)


def test_device_lost_on_labels_suspects_their_jobs_only() -> None:
    """The process ends, and the jobs of these labels count as on the device."""
    place = Place()
    bad = words(1)
    place.tower.errors[bad.words[0]] = RuntimeError("LOST")
    job, other = place.admit(bad), place.admit(words(100))
    with pytest.raises(FatalError) as caught:
        place.finish()
    assert caught.value.exit_code is ExitCode.DEVICE
    assert (job.is_on_device, other.is_on_device) == (True, False)


def test_configured_sets_are_encoded_while_the_device_is_idle() -> None:
    """Not while images wait, and after the labels of all jobs; a job that needs the set makes it urgent."""
    place = Place(sets=[CONFIGURED])
    assert place.queue.wait_s(is_idle=False) is None
    assert place.portion(is_idle=False) == ([], 0.0)
    place.admit(words(3))
    place.portion()
    assert place.observer.labels == [(Lane.BULK, 3)]
    job = place.admit(CONFIGURED, Lane.INTERACTIVE)
    assert place.queue.wait_s(is_idle=False) == 0.0
    place.queue.discard([job])
    assert place.queue.wait_s(is_idle=False) is None
    place.finish()
    assert place.bank.known(CONFIGURED) is not None


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "again", "portion", "busy", "cancel"]), st.integers(1, 60), st.booleans()),
    max_size=40,
)


@given(ACTIONS)
def test_every_job_leaves_once_with_labels_or_unwanted(actions: list[tuple[str, int, bool]]) -> None:
    """In whatever order jobs come, go and are cancelled, and no portion is longer than its aim."""
    place = Place()
    left: list[Job] = []
    admitted: list[Job] = []
    sets = [words(1)]
    for action, size, is_interactive in actions:
        lane = Lane.INTERACTIVE if is_interactive else Lane.BULK
        if action in {"admit", "again"}:
            sets += [words(size)] if action == "admit" else []
            job = make_job(lane)
            decision = place.queue.admit(job, sets[size % len(sets)])
            if isinstance(decision, Admit):
                admitted.append(job)
                job.labels = job.labels or decision.labels
                left += place.queue.loaded([job])
        elif action == "cancel" and admitted:
            admitted[size % len(admitted)].is_answered_elsewhere = True
            left += place.queue.drop_unwanted(place.clock.now_s)
        else:
            ready, took_s = place.portion(is_idle=action == "portion")
            left += ready
            assert took_s <= LIMITS.portion_s * 1.01
    left += place.finish()
    assert sorted(job.id for job in left) == sorted(job.id for job in admitted)
    assert all(job.labels is not None or job.is_answered_elsewhere for job in left)
    assert (len(place.queue), set(place.queue.words_waiting().values())) == (0, {0})


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("jitter", [0.75, 1.25])
def test_deferred_job_returns_when_its_lane_may_have_room(
    monkeypatch: pytest.MonkeyPatch, lane: Lane, jitter: float
) -> None:
    """After what its labels take, divided by the lane's share of the time, with jitter."""

    def choose(least: float, most: float) -> float:
        assert (least, most) == (0.75, 1.25)
        return jitter

    monkeypatch.setattr("random.uniform", choose)
    limits = replace(LIMITS, jobs_per_lane=3, quick_s=0.25)
    place = Place(limits=limits)
    for _ in range(3):
        place.admit(words(200), lane)
    lane_s = place.bank.cost.seconds(sum(entry.units for entry in place.queue._entries.values()))
    share = limits.interactive_share if lane is Lane.INTERACTIVE else limits.bulk_share
    decision = place.queue.admit(make_job(lane), words(1))
    assert isinstance(decision, Defer)
    expected_s = min(LONGEST_DELAY_S, max(SHORTEST_DELAY_S, lane_s / share * jitter))
    assert decision.delay_s == pytest.approx(expected_s)
    assert SHORTEST_DELAY_S < expected_s < LONGEST_DELAY_S


@pytest.mark.parametrize(("jobs", "is_slow", "is_deferred"), [(2, True, False), (3, True, True), (3, False, False)])
def test_job_is_deferred_by_number_and_time(jobs: int, *, is_slow: bool, is_deferred: bool) -> None:
    """Only where both are reached: so many jobs, and more than a moment for their labels."""
    place = Place()
    for _ in range(jobs):
        place.admit(words(100))
    lane_s = place.bank.cost.seconds(sum(entry.units for entry in place.queue._entries.values()))
    place.queue._limits = replace(LIMITS, jobs_per_lane=3, quick_s=lane_s - 1e-6 if is_slow else lane_s)
    assert isinstance(place.queue.admit(make_job(Lane.BULK), words(1)), Defer) is is_deferred
    assert isinstance(place.queue.admit(make_job(Lane.INTERACTIVE), words(1)), Admit)


def test_delay_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment at least, and half a minute at most."""
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    for count, expected_s in ((2, SHORTEST_DELAY_S), (20_000, LONGEST_DELAY_S)):
        place = Place(limits=replace(LIMITS, jobs_per_lane=1, quick_s=0.0, max_request_s=1e6))
        place.admit(words(count))
        assert place.queue.admit(make_job(Lane.BULK), words(1)) == Defer(expected_s)


def test_waiting_jobs_are_counted_for_each_lane() -> None:
    """From their admission until their labels are there, or they leave."""
    place = Place(sets=[CONFIGURED])
    assert place.queue.waiting_jobs() == {Lane.INTERACTIVE: 0, Lane.BULK: 0}
    first, second = words(3), words(4)
    jobs = [place.admit(first), place.admit(first, Lane.INTERACTIVE), place.admit(second)]
    assert place.queue.waiting_jobs() == {Lane.INTERACTIVE: 1, Lane.BULK: 2}
    assert place.queue.words_waiting() == {Lane.INTERACTIVE: 3, Lane.BULK: 4, None: 100}
    place.queue.discard([jobs[1], make_job(Lane.BULK)])
    assert place.queue.waiting_jobs() == {Lane.INTERACTIVE: 0, Lane.BULK: 2}
    assert place.queue.words_waiting() == {Lane.INTERACTIVE: 0, Lane.BULK: 7, None: 100}
    place.finish()
    assert place.queue.waiting_jobs() == {Lane.INTERACTIVE: 0, Lane.BULK: 0}
    assert place.queue.words_waiting() == {Lane.INTERACTIVE: 0, Lane.BULK: 0, None: 0}


def test_set_stays_urgent_while_an_interactive_job_needs_it() -> None:
    """One of two leaves, or a bulk job: the other interactive job still waits for it."""
    place = Place()
    label_set = words(3)
    one, two, bulk = (place.admit(label_set, lane) for lane in (Lane.INTERACTIVE, Lane.INTERACTIVE, Lane.BULK))
    place.queue.discard([one])
    assert place.queue.words_waiting()[Lane.INTERACTIVE] == 3
    place.queue.discard([bulk])
    assert place.queue.words_waiting()[Lane.INTERACTIVE] == 3
    place.queue.discard([two])
    assert set(place.queue.words_waiting().values()) == {0}


@pytest.mark.parametrize(("templates", "texts"), [(1, MAX_TEXTS), (2, MAX_TEXTS // 2), (3, MAX_TEXTS // 3)])
def test_portion_has_a_bound_of_texts(templates: int, texts: int) -> None:
    """However long a batch of images takes: each label makes a text with each template."""
    place = Place(limits=replace(LIMITS, max_request_s=1e6))
    place.image_s = 1e6
    label_set = replace(words(300), templates=tuple(f"{number} {{}}" for number in range(templates)))
    place.admit(label_set)
    place.portion()
    assert place.observer.labels == [(Lane.BULK, texts)]
    assert place.queue.words_waiting()[Lane.BULK] == 300 - texts


def test_portion_has_at_least_one_label() -> None:
    """Also where one alone takes longer than the aim; the shortest labels come first."""
    place = Place(limits=replace(LIMITS, portion_s=1e-9))
    job = make_job(Lane.BULK)
    place.queue.admit(job, LabelSet(None, ("a much longer label", "short", "in between")))
    for expected in ("short", "in between", "a much longer label"):
        place.tower.texts.clear()
        place.portion()
        assert place.tower.texts == [expected]
    assert job.labels is not None
    assert len(place.queue) == 0


def test_jobs_with_other_heads_get_their_own_label_sets() -> None:
    """The labels are encoded once; each job has the vectors under the set that it named."""
    place = Place()
    plain = words(3)
    other = replace(plain, head="sigmoid")
    jobs = [place.admit(plain), place.admit(other)]
    assert [job.label_set for job in jobs] == [plain, other]
    place.finish()
    assert len(place.tower.texts) == 3
    for job, label_set in zip(jobs, (plain, other), strict=True):
        assert job.labels is not None
        assert job.labels.label_set == label_set


def test_share_of_a_lane_counts_from_the_begin_of_a_portion() -> None:
    """The next one begins when the last has taken its share of the time, and exactly then."""
    place = Place(limits=replace(LIMITS, bulk_share=0.25))
    place.admit(words(1000))
    _, took_s = place.portion(is_idle=False)
    wait_s = place.queue.wait_s(is_idle=False)
    assert wait_s == pytest.approx(3 * took_s)
    place.clock.now_s = place.queue._not_before_s[Lane.BULK]
    assert place.queue.wait_s(is_idle=False) == 0.0
    assert place.portion(is_idle=False)[1] > 0
    place.admit(words(2), Lane.INTERACTIVE)
    assert place.queue.wait_s(is_idle=False) == 0.0, "the other lane has its own share"


def test_jobs_are_on_the_device_while_their_labels_are() -> None:
    """And no longer, also where the labels failed: an error of another job must not count for them."""
    place = Place()
    label_set, bad = words(2), words(1)
    job = place.admit(label_set)
    seen: list[bool] = []
    encode = place.tower.encode

    def note(texts: Sequence[str]) -> NDArray[np.float32]:
        seen.append(job.is_on_device)
        return encode(texts)

    place.bank._encode_texts = note
    place.finish()
    assert (seen, job.is_on_device) == ([True], False)
    place.tower.errors[bad.words[0]] = ValueError("a kernel failed")
    failing = place.admit(bad)
    place.finish()
    assert not failing.is_on_device
    assert failing.error is not None
    assert failing.error.retryable is False
