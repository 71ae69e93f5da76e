"""Claims from several shards: whose turn it is, and what a shard that does not answer costs the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import redis

from shiwu.contract import Lane
from shiwu_worker.jobs.job import Claimed, Release
from shiwu_worker.runtime.shard_health import ShardBackoff, ShardHealth
from shiwu_worker.stages.claim.lease_queue import ClaimResult
from shiwu_worker.stages.claim.shard_claims import ShardClaims
from shiwu_worker.stages.claim.sharded_claims import LATE_S, ROUND_TIMEOUT_S, ShardedClaims
from tests.support.waiting import wait_until

INTERACTIVE, BULK = Lane.INTERACTIVE, Lane.BULK
HELD: Collection[str] = ("something",)


class Queue:
    """The lease queue of one shard, as a test fills it."""

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self.lanes: dict[Lane, list[str]] = {INTERACTIVE: [], BULK: []}
        self.asks: list[tuple[int, int, bool]] = []
        """Limit, limit of bulk, and whether nothing was held, of each claim."""
        self.answers = threading.Event()
        self.answers.set()
        self.error: redis.RedisError | None = None
        self.quarantined: list[str] = []
        self.released: list[Release] = []
        self.refused: list[Release] = []
        self.has_lost_reply = self.has_ended = False

    def claim(self, limit: int, *, bulk_limit: int, held: Collection[str], is_idle: bool) -> ClaimResult:
        """Claim what the test put in."""
        self.asks.append((limit, bulk_limit, is_idle))
        assert self.answers.wait(30)
        if self.error is not None:
            self.has_lost_reply = True
            raise self.error
        if self.quarantined:
            ids = [self.quarantined.pop()] if is_idle else []
            return ClaimResult(tuple(self._claimed(INTERACTIVE, job_id) for job_id in ids), is_quarantine_owner=True)
        jobs: list[Claimed] = []
        for lane, most in ((INTERACTIVE, limit), (BULK, bulk_limit)):
            count = min(most, limit - len(jobs))
            jobs += [self._claimed(lane, job_id) for job_id in self.lanes[lane][:count]]
            del self.lanes[lane][:count]
        return ClaimResult(tuple(jobs))

    def _claimed(self, lane: Lane, job_id: str) -> Claimed:
        return Claimed(id=job_id, attempt=1, key=lane.queue, raw=b"", claimed_ms=1.0, claimed_s=1.0, shard=self._shard)

    def release_lost(self, held: Collection[str]) -> int:
        """Give up the last claim."""
        del held
        if self.error is not None:
            raise self.error
        self.has_lost_reply = False
        return 0

    def end(self, held: Collection[str]) -> int:
        """Claim no more."""
        self.has_ended = True
        return self.release_lost(held)

    def release(self, releases: Sequence[Release]) -> int:
        """Keep what is released."""
        if self.error is not None:
            self.refused += releases
            raise self.error
        self.released += releases
        return len(releases)


class Shards:
    """Claims from `count` shards whose threads run."""

    def __init__(self, count: int) -> None:
        self.queues = [Queue(index) for index in range(count)]
        self.dried: list[int] = []
        """The shards of claims that found nothing."""
        self.health = ShardHealth(count)
        self.runs_nothing = False
        changed = threading.Condition()
        self.shards = [
            ShardClaims(
                index,
                queue,  # type: ignore[arg-type]  # what the thread uses of it
                changed=changed,
                backoff=ShardBackoff("claim", shard=index, health=self.health),
                on_fatal=lambda error: pytest.fail(str(error)),
                on_dry=partial(self.dried.append, index),
            )
            for index, queue in enumerate(self.queues)
        ]
        self.claims = ShardedClaims(
            self.shards,
            changed=changed,
            is_away=self.health.is_away,
            runs_nothing=lambda: self.runs_nothing,
            close_timeout_s=5.0,
        )

    def fill(self, lane: Lane, count: int) -> None:
        """Put so many messages into a lane of every shard."""
        for index, queue in enumerate(self.queues):
            queue.lanes[lane] += [f"{index}:{lane}:{number}" for number in range(count)]

    def claim(self, limit: int, **options: Any) -> list[int]:
        """The shards of the jobs of one claim."""
        return [job.shard for job in self.claims.claim(limit, held=HELD, **options).jobs]

    def asked(self) -> list[int]:
        """The shards that were asked since the last call."""
        found = [index for index, queue in enumerate(self.queues) for _ in queue.asks]
        for queue in self.queues:
            queue.asks.clear()
        return found

    def note_messages(self, shard: int) -> None:
        """Let the lane watch see messages in the lanes of a shard that had none."""
        lanes = self.shards[shard].dry_lanes()
        assert lanes
        self.shards[shard].note_messages_in(lanes)
        assert self.shards[shard].is_notified
        assert self.shards[shard].dry_lanes() == []
        assert self.claims.wait(10.0)


@contextmanager
def running(count: int) -> Iterator[Shards]:
    """Shards whose threads run."""
    shards = Shards(count)
    for shard in shards.shards:
        shard.thread.start()
    try:
        yield shards
    finally:
        for queue in shards.queues:
            queue.answers.set()
        shards.claims.close()
        for shard in shards.shards:
            assert shard.thread.join(10.0)


def test_round_asks_two_shards_and_the_next_round_the_next_two() -> None:
    """Half of the room each."""
    with running(4) as shards:
        shards.fill(INTERACTIVE, 20)
        assert shards.claim(5) == [0, 0, 0, 1, 1]
        assert shards.claim(4) == [2, 2, 3, 3]
        assert shards.claim(2) == [0, 1]
        assert shards.claim(1) == [2]
        assert [queue.asks[0][:2] for queue in shards.queues] == [(3, 3), (2, 2), (2, 2), (2, 2)]


def test_empty_shard_is_not_asked_until_it_rings() -> None:
    """Then it is asked before shards that always have messages."""
    with running(4) as shards:
        for index in (0, 1, 2):
            shards.queues[index].lanes[BULK] += [f"{index}:{number}" for number in range(40)]
        shards.claim(2), shards.claim(2), shards.claim(2)
        shards.asked()
        assert {shard for _ in range(4) for shard in shards.claim(2)} == {0, 1, 2}
        assert 3 not in shards.asked()
        shards.queues[3].lanes[INTERACTIVE].append("new")
        shards.note_messages(3)
        assert 3 in shards.claim(2)


def test_claim_without_messages_asks_each_shard_once() -> None:
    """And `wait` blocks afterwards."""
    with running(5) as shards:
        assert shards.claim(10) == []
        assert shards.asked() == [0, 1, 2, 3, 4]
        wait_until(lambda: sorted(shards.dried) == [0, 1, 2, 3, 4], timeout_s=10, what="the lane watch is told")
        assert shards.claim(10) == []
        assert shards.asked() == []
        assert not shards.claims.wait(0.01)


def test_frozen_shard_keeps_room_for_a_while() -> None:
    """The other shards are asked meanwhile, soon for all of the room."""
    with running(3) as shards:
        shards.fill(INTERACTIVE, 6)
        shards.queues[0].answers.clear()
        began_s = time.monotonic()
        assert shards.claim(4) == [1, 1]
        assert time.monotonic() - began_s >= ROUND_TIMEOUT_S
        assert shards.claim(4) == [2, 1]
        assert shards.claim(2) == []
        wait_until(lambda: time.monotonic() - began_s > LATE_S, timeout_s=10, what="the reply is late")
        assert shards.claim(4) == [2, 2, 1, 1]
        shards.queues[0].answers.set()
        wait_until(lambda: shards.shards[0].result is not None, timeout_s=10, what="the late reply")
        assert shards.claim(8) == [0, 0]


def test_slow_shards_are_asked_for_no_more_than_the_room() -> None:
    """So no job is claimed that would have to go back."""
    with running(6) as shards:
        shards.fill(BULK, 8)
        for queue in shards.queues:
            queue.answers.clear()
        assert shards.claim(4) == []
        assert shards.asked() == [0, 1]
        for queue in shards.queues:
            queue.answers.set()
        wait_until(lambda: all(shard.result for shard in shards.shards[:2]), timeout_s=10, what="two late replies")
        assert shards.claim(4) == [0, 0, 1, 1]
        assert not any(queue.released for queue in shards.queues)


def test_late_reply_without_room_goes_back_to_its_shard() -> None:
    """The last released comes first in its lane, so the order stays."""
    with running(2) as shards:
        shards.queues[0].lanes[BULK] += ["a", "b", "c"]
        shards.queues[0].lanes[INTERACTIVE] += ["i"]
        shards.queues[0].answers.clear()
        assert shards.claim(8) == []
        shards.queues[0].answers.set()
        wait_until(lambda: shards.shards[0].result is not None, timeout_s=10, what="the late reply")
        assert [job.id for job in shards.claims.claim(3, bulk_limit=1, held=HELD).jobs] == ["i", "a"]
        wait_until(lambda: len(shards.queues[0].released) == 2, timeout_s=10, what="two jobs are released")
        assert [each.id for each in shards.queues[0].released] == ["c", "b"]


def test_jobs_without_room_go_back_once_their_shard_answers() -> None:
    """Otherwise their leases would expire, which counts as the death of a worker."""
    with running(2) as shards:
        queue = shards.queues[0]
        queue.lanes[BULK] += ["a", "b", "c"]
        queue.answers.clear()
        assert shards.claim(8) == []
        queue.answers.set()
        wait_until(lambda: shards.shards[0].result is not None, timeout_s=10, what="the late reply")
        queue.error = redis.ConnectionError("gone")
        assert [job.id for job in shards.claims.claim(1, held=HELD).jobs] == ["a"]
        wait_until(lambda: shards.health.is_away(0), timeout_s=10, what="the release failed")
        assert [each.id for each in queue.refused] == ["c", "b"]
        queue.error = None
        wait_until(lambda: not shards.health.is_away(0), timeout_s=10, what="the shard answers again")
        assert [each.id for each in queue.released] == ["c", "b"]


def test_failing_shard_is_left_out_until_it_answers() -> None:
    """Others are claimed from; it is logged and counted as away."""
    with running(3) as shards:
        shards.fill(INTERACTIVE, 50)
        shards.queues[1].error = redis.ConnectionError("gone")
        shards.claim(2)
        wait_until(lambda: shards.health.is_away(1), timeout_s=10, what="shard 1 is away")
        assert shards.shards[1].dry_lanes() == []
        shards.asked()
        assert {shard for _ in range(6) for shard in shards.claim(2)} == {0, 2}
        assert 1 not in shards.asked()
        shards.queues[1].error = None
        wait_until(lambda: not shards.health.is_away(1), timeout_s=10, what="shard 1 is back")
        wait_until(lambda: 1 in shards.claim(2), timeout_s=10, what="shard 1 is claimed from")


def test_claim_raises_when_no_shard_answers() -> None:
    """An error that only the operator can remove first."""
    with running(3) as shards:
        for queue in shards.queues:
            queue.error = redis.ConnectionError("gone")
        shards.queues[2].error = redis.AuthenticationError("WRONGPASS wrong")
        with pytest.raises(redis.AuthenticationError):
            shards.claim(2)


def test_quarantined_job_runs_alone() -> None:
    """Nothing is claimed with it, neither from its shard nor from another; in between others have their turn."""
    with running(3) as shards:
        shards.fill(INTERACTIVE, 50)
        shards.queues[1].quarantined += ["last", "first"]
        found = shards.claims.claim(4, held=HELD)
        assert (found.is_quarantine_owner, {job.shard for job in found.jobs}) == (True, {0})
        shards.runs_nothing = True
        claimed = []
        for _ in range(5):
            result = shards.claims.claim(4, held=())
            claimed.append([job.id for job in result.jobs if job.id in {"first", "last"}] or len(result.jobs))
        assert claimed == [["first"], 4, ["last"], 4, 4]
        assert (result.is_quarantine_owner, {job.shard for job in result.jobs}) == (False, {1})


def test_dry_lanes_are_looked_at_before_their_reply_is_taken() -> None:
    """A lane watch that saw none would not look for long; it is told after each claim that leaves one."""
    with running(1) as shards:
        shards.queues[0].answers.clear()
        assert shards.claim(1) == []
        assert shards.shards[0].dry_lanes() == []
        shards.queues[0].answers.set()
        wait_until(lambda: bool(shards.dried), timeout_s=10, what="the lane watch is told")
        assert shards.shards[0].dry_lanes() == [INTERACTIVE, BULK]
        shards.fill(BULK, 3)
        shards.shards[0].note_messages_in([BULK])
        shards.claim(1)
        wait_until(lambda: len(shards.dried) == 2, timeout_s=10, what="the lane watch is told again")
        assert shards.shards[0].dry_lanes() == [INTERACTIVE]


def test_bulk_wakes_the_loop_only_while_there_is_room_for_it() -> None:
    """A shard with bulk messages only is asked for interactive ones once."""
    with running(2) as shards:
        shards.fill(BULK, 5)
        assert shards.claim(4, bulk_limit=0) == []
        assert shards.asked() == [0, 1]
        assert [shard.dry_lanes() for shard in shards.shards] == [[INTERACTIVE]] * 2
        assert not shards.claims.wait(0.01, lanes=(INTERACTIVE,))
        assert shards.claim(4, bulk_limit=0) == []
        assert shards.asked() == []
        assert shards.claims.wait(0.01)
        assert sorted(shards.claim(4)) == [0, 0, 1, 1]


def test_room_for_one_bulk_job_asks_one_shard() -> None:
    """Half of it would be none, and a shard that is asked for none seems to have none."""
    with running(2) as shards:
        shards.fill(BULK, 5)
        assert shards.claim(8, bulk_limit=1) == [0]
        assert shards.claim(8, bulk_limit=1) == [1]


def test_releases_go_to_the_shards_of_their_jobs() -> None:
    """One failing shard keeps no other from its jobs."""
    with running(3) as shards:
        assert shards.claims.release([Release("a", shard=2), Release("b", shard=0), Release("c", shard=2)]) == 3
        assert [[each.id for each in queue.released] for queue in shards.queues] == [["b"], [], ["a", "c"]]
        shards.queues[0].error = redis.ConnectionError("gone")
        with pytest.raises(redis.ConnectionError):
            shards.claims.end()
        assert [queue.has_ended for queue in shards.queues] == [True, True, True]


def test_notify_and_ring_wake_the_waiting_thread() -> None:
    """`ring` also lets the shard be asked."""
    with running(2) as shards:
        assert shards.claim(2) == []
        assert not shards.claims.wait(0.0)
        shards.claims.notify()
        assert shards.claims.wait(10.0)
        shards.asked()
        shards.claims.note_messages(1)
        assert shards.claims.wait(10.0)
        assert shards.claim(2) == []
        assert shards.asked() == [1]
