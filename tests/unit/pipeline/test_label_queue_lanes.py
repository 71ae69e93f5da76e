"""Lanes of the label queue: shares of the time, jobs that are deferred, and how many wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shiwu.contract import Lane
from shiwu_worker.pipeline.admission import Admit, Defer
from shiwu_worker.pipeline.label_queue import LONGEST_DELAY_S, SHORTEST_DELAY_S
from tests.support.label_queues import CONFIGURED, LIMITS, QueueParts, make_job, words


def test_bulk_labels_keep_to_their_share_while_images_wait() -> None:
    """Of the encode thread's time they get a fifth; an idle device encodes without pauses."""
    parts = QueueParts()
    parts.admit(words(1000))
    began_s, spent_s = parts.clock.now_s, 0.0
    for _ in range(20):
        assert parts.queue.wait_s(is_idle=False) == 0.0
        spent_s += parts.portion(is_idle=False)[1]
        wait_s = parts.queue.wait_s(is_idle=False)
        assert wait_s is not None
        assert wait_s > 0
        assert parts.portion(is_idle=False) == ([], 0.0)
        assert parts.queue.wait_s(is_idle=True) == 0.0
        parts.clock.now_s += wait_s + 1e-9
    assert spent_s / (parts.clock.now_s - began_s) == pytest.approx(LIMITS.bulk_share, rel=0.05)


def test_full_queue_gives_jobs_back_without_an_attempt() -> None:
    """Beyond the bound of its lane a job is deferred; the other lane has room of its own."""
    parts = QueueParts()
    for _ in range(LIMITS.jobs_per_lane):
        parts.admit(words(1000))
    decision = parts.queue.admit(make_job(Lane.BULK), words(1))
    assert isinstance(decision, Defer)
    assert SHORTEST_DELAY_S <= decision.delay_s <= LONGEST_DELAY_S
    assert len(parts.queue) == LIMITS.jobs_per_lane
    parts.admit(words(1000), Lane.INTERACTIVE)


def test_quick_labels_are_not_deferred() -> None:
    """Many jobs with few new labels wait for a moment only, so they are not sent back to Redis."""
    parts = QueueParts()
    jobs = [parts.admit(words(2)) for _ in range(4 * LIMITS.jobs_per_lane)]
    assert sorted(job.id for job in parts.finish()) == sorted(job.id for job in jobs)


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
    parts = QueueParts(limits=limits)
    for _ in range(3):
        parts.admit(words(200), lane)
    lane_s = parts.bank.cost.seconds(sum(entry.units for entry in parts.queue._entries.values()))
    share = limits.interactive_share if lane is Lane.INTERACTIVE else limits.bulk_share
    decision = parts.queue.admit(make_job(lane), words(1))
    assert isinstance(decision, Defer)
    expected_s = min(LONGEST_DELAY_S, max(SHORTEST_DELAY_S, lane_s / share * jitter))
    assert decision.delay_s == pytest.approx(expected_s)
    assert SHORTEST_DELAY_S < expected_s < LONGEST_DELAY_S


@pytest.mark.parametrize(("jobs", "is_slow", "is_deferred"), [(2, True, False), (3, True, True), (3, False, False)])
def test_job_is_deferred_by_number_and_time(jobs: int, *, is_slow: bool, is_deferred: bool) -> None:
    """Only where both are reached: so many jobs, and more than a moment for their labels."""
    parts = QueueParts()
    for _ in range(jobs):
        parts.admit(words(100))
    lane_s = parts.bank.cost.seconds(sum(entry.units for entry in parts.queue._entries.values()))
    parts.queue._limits = replace(LIMITS, jobs_per_lane=3, quick_s=lane_s - 1e-6 if is_slow else lane_s)
    assert isinstance(parts.queue.admit(make_job(Lane.BULK), words(1)), Defer) is is_deferred
    assert isinstance(parts.queue.admit(make_job(Lane.INTERACTIVE), words(1)), Admit)


def test_delay_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment at least, and half a minute at most."""
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    for count, expected_s in ((2, SHORTEST_DELAY_S), (20_000, LONGEST_DELAY_S)):
        parts = QueueParts(limits=replace(LIMITS, jobs_per_lane=1, quick_s=0.0, max_request_s=1e6))
        parts.admit(words(count))
        assert parts.queue.admit(make_job(Lane.BULK), words(1)) == Defer(expected_s)


def test_waiting_jobs_are_counted_for_each_lane() -> None:
    """From their admission until their labels are there, or they leave."""
    parts = QueueParts(sets=[CONFIGURED])
    assert parts.queue.waiting_jobs() == {Lane.INTERACTIVE: 0, Lane.BULK: 0}
    first, second = words(3), words(4)
    jobs = [parts.admit(first), parts.admit(first, Lane.INTERACTIVE), parts.admit(second)]
    assert parts.queue.waiting_jobs() == {Lane.INTERACTIVE: 1, Lane.BULK: 2}
    assert parts.queue.words_waiting() == {Lane.INTERACTIVE: 3, Lane.BULK: 4, None: 100}
    parts.queue.discard([jobs[1], make_job(Lane.BULK)])
    assert parts.queue.waiting_jobs() == {Lane.INTERACTIVE: 0, Lane.BULK: 2}
    assert parts.queue.words_waiting() == {Lane.INTERACTIVE: 0, Lane.BULK: 7, None: 100}
    parts.finish()
    assert parts.queue.waiting_jobs() == {Lane.INTERACTIVE: 0, Lane.BULK: 0}
    assert parts.queue.words_waiting() == {Lane.INTERACTIVE: 0, Lane.BULK: 0, None: 0}


def test_set_stays_urgent_while_an_interactive_job_needs_it() -> None:
    """One of two leaves, or a bulk job: the other interactive job still waits for it."""
    parts = QueueParts()
    label_set = words(3)
    one, two, bulk = (parts.admit(label_set, lane) for lane in (Lane.INTERACTIVE, Lane.INTERACTIVE, Lane.BULK))
    parts.queue.discard([one])
    assert parts.queue.words_waiting()[Lane.INTERACTIVE] == 3
    parts.queue.discard([bulk])
    assert parts.queue.words_waiting()[Lane.INTERACTIVE] == 3
    parts.queue.discard([two])
    assert set(parts.queue.words_waiting().values()) == {0}


def test_share_of_a_lane_counts_from_the_begin_of_a_portion() -> None:
    """The next one begins when the last has taken its share of the time, and exactly then."""
    parts = QueueParts(limits=replace(LIMITS, bulk_share=0.25))
    parts.admit(words(1000))
    _, took_s = parts.portion(is_idle=False)
    wait_s = parts.queue.wait_s(is_idle=False)
    assert wait_s == pytest.approx(3 * took_s)
    parts.clock.now_s = parts.queue._not_before_s[Lane.BULK]
    assert parts.queue.wait_s(is_idle=False) == 0.0
    assert parts.portion(is_idle=False)[1] > 0
    parts.admit(words(2), Lane.INTERACTIVE)
    assert parts.queue.wait_s(is_idle=False) == 0.0, "the other lane has its own share"
