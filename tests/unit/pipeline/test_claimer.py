"""The claim loop without a server: when it claims, what it passes on, and whom it tells."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.contract import Lane
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Claimed, Job
from shiwu_worker.pipeline import claimer as module
from shiwu_worker.pipeline.claimer import IDLE_WAIT_S, Claimer
from shiwu_worker.pipeline.in_flight import NO_ROOM, Room
from shiwu_worker.stages.batch import INTERACTIVE_PAUSE_S
from shiwu_worker.stages.claim.lease_queue import ClaimResult
from tests.support.observers import RecordingObserver
from tests.support.redis_parts import message

AWAY = redis.ConnectionError("away")
WRONG = redis.AuthenticationError("wrong")
NOTHING = ClaimResult(())


def claimed(*ids: str, is_quarantine_owner: bool = False) -> ClaimResult:
    """A claim with these jobs; those whose names begin with `user` are interactive."""
    jobs = tuple(
        Claimed(
            id=job_id,
            attempt=1,
            deaths=0,
            key=(Lane.INTERACTIVE if job_id.startswith("user") else Lane.BULK).queue,
            raw=message(job_id),
            claimed_ms=1000.0,
            claimed_s=1.0,
            is_revoked=False,
            history=b"",
            generation=0,
        )
        for job_id in ids
    )
    return ClaimResult(jobs, is_quarantine_owner=is_quarantine_owner)


class InFlight(list[str]):
    """Jobs in flight with room as the test says."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._place = parts
        self.room = Room(5, 3)
        self.asked: list[tuple[bool, float]] = []
        self.is_bulk_full = False
        self.woken = 0

    def wait_for_room(self, *, is_quarantine_owner: bool, is_closing: Any, timeout_s: float) -> Room:
        """The room."""
        assert not is_closing()
        self.asked.append((is_quarantine_owner, timeout_s))
        if len(self.asked) > 20:
            self._place.claimer.close()
        return self.room

    def call_on_bulk_room(self, notify: Any) -> bool:
        """Whether bulk is full."""
        assert notify is not None
        return self.is_bulk_full

    def wake(self) -> None:
        """Count it."""
        self.woken += 1


class Parts:
    """A claimer over claims that give what the test says; it is closed with the last one."""

    def __init__(self, *replies: ClaimResult | Exception, is_lost: bool = False) -> None:
        self.replies = list(replies)
        self.claims: list[tuple[int, int]] = []
        self.released: list[str] = []
        self.passed: list[list[str]] = []
        self.waits: list[tuple[float, tuple[Lane, ...]]] = []
        self.pauses: list[Exception] = []
        self.counts = {"reset": 0, "progress": 0, "idle": 0, "closed": 0, "reconnect": 0}
        self.observer = RecordingObserver()
        self.in_flight = InFlight(self)
        self.queue: Any = SimpleNamespace(
            has_lost_reply=is_lost, claim=self._claim, release_lost=self._release_lost, end=self._end
        )
        notifier: Any = SimpleNamespace(
            wait=self._wait,
            notify=lambda: None,
            reconnect=lambda: self._count("reconnect"),
            close=lambda: self._count("closed"),
        )
        in_flight: Any = self.in_flight
        backoff: Any = SimpleNamespace(
            wait=lambda error, _: self.pauses.append(error), reset=lambda: self._count("reset")
        )
        progress: Any = SimpleNamespace(mark=lambda: self._count("progress"))
        meter: Any = SimpleNamespace(idle=lambda seconds: self._count("idle" if 0 <= seconds < 60 else "wrong"))
        self.claimer = Claimer(
            self.queue,
            notifier,
            in_flight,
            zone=UTC,
            backoff=backoff,
            progress=progress,
            meter=meter,
            observer=self.observer,
        )

    def _count(self, name: str) -> None:
        self.counts[name] += 1

    def _claim(self, limit: int, *, bulk_limit: int, held: Any) -> ClaimResult:
        assert held is self.in_flight
        self.claims.append((limit, bulk_limit))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _release_lost(self, held: Any) -> None:
        assert held is self.in_flight
        self.released.append("lost")
        self.queue.has_lost_reply = False

    def _end(self, held: Any) -> None:
        assert held is self.in_flight
        self.released.append("end")
        raise AWAY

    def _wait(self, timeout_s: float, *, lanes: tuple[Lane, ...]) -> None:
        self.waits.append((timeout_s, lanes))
        if not self.replies:
            self.claimer.close()

    def run(self) -> None:
        """Run the loop until it was closed."""

        def on_claimed(jobs: Sequence[Job]) -> None:
            self.passed.append([job.id for job in jobs])
            if not self.replies:
                self.claimer.close()

        self.claimer.run(on_claimed)


def test_claimed_jobs_are_passed_on() -> None:
    """As many as there is room for; a claim that succeeds is reported once, and its end."""
    parts = Parts(claimed("a", "b"), claimed("c"))
    parts.run()
    assert parts.claims == [(5, 3)] * 2
    assert parts.passed == [["a", "b"], ["c"]]
    assert parts.observer.claims == [True, False]
    assert parts.waits == []
    assert parts.counts == {"reset": 2, "progress": 2, "idle": 0, "closed": 1, "reconnect": 0}
    assert parts.in_flight.asked == [(False, IDLE_WAIT_S)] * 2
    assert (parts.in_flight.woken, parts.released) == (1, ["end"])


def test_interactive_messages_do_not_wait_until_bulk_is_read() -> None:
    """They are passed on first, in their order."""
    parts = Parts(claimed("a", "user-1", "b", "user-2"), claimed("user-3"))
    parts.run()
    assert parts.passed == [["user-1", "user-2"], ["a", "b"], ["user-3"]]


def test_bulk_claims_are_bounded_while_interactive_jobs_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At least one is claimed. Costs count at once when they grow; without interactive jobs there is no bound."""
    cpu_s = iter([0.0, 0.008, 0.0, 0.001, 0.0, 0.1, 0.0, 0.001])
    now_s = [100.0]
    clock = SimpleNamespace(thread_time=lambda: next(cpu_s), monotonic=lambda: now_s[0])
    monkeypatch.setattr(module, "time", clock)
    parts = Parts(claimed("a", "b", "c", "d"), claimed("user-1", "e"), claimed("f"), claimed("user-2"), claimed("g"))
    parts.in_flight.room = Room(5, 4)
    waiting_for_room = parts.in_flight.wait_for_room

    def wait(**options: Any) -> Room:
        if len(parts.claims) == 4:
            now_s[0] += INTERACTIVE_PAUSE_S
        return waiting_for_room(**options)

    parts.in_flight.wait_for_room = wait  # type: ignore[method-assign]  # time passes
    parts.run()
    # After 2 ms for each of four, no interactive job had come; then 1.5 ms each, then 100 ms each.
    assert [bulk for _, bulk in parts.claims] == [4, 4, 3, 1, 4]


@pytest.mark.parametrize("is_bulk_full", [True, False])
def test_empty_lanes_are_waited_for(*, is_bulk_full: bool) -> None:
    """Those that have room; time without any job counts as idle."""
    parts = Parts(NOTHING)
    parts.in_flight.is_bulk_full = is_bulk_full
    parts.run()
    assert parts.waits == [(IDLE_WAIT_S, (Lane.INTERACTIVE,) if is_bulk_full else tuple(Lane))]
    assert (parts.counts["idle"], parts.counts["progress"]) == (1, 1)
    busy = Parts(NOTHING)
    busy.in_flight.append("held")
    busy.run()
    assert (busy.counts["idle"], busy.counts["progress"]) == (0, 0), "others can end the jobs in flight"


def test_nothing_is_claimed_without_room() -> None:
    """It looks again after a while."""
    parts = Parts()
    parts.in_flight.room = NO_ROOM
    parts.run()
    assert (parts.claims, len(parts.in_flight.asked)) == ([], 21)


def test_owner_of_the_quarantine_claims_again() -> None:
    """Without a wait for messages, once nothing is in flight."""
    parts = Parts(claimed(is_quarantine_owner=True), claimed("q", is_quarantine_owner=True), NOTHING)
    parts.run()
    assert [owns for owns, _ in parts.in_flight.asked] == [False, True, True]
    assert len(parts.waits) == 1


def test_lost_reply_is_released_before_a_claim() -> None:
    """And the room is looked at again."""
    parts = Parts(claimed("a"), is_lost=True)
    parts.run()
    assert parts.released == ["lost", "end"]
    assert len(parts.in_flight.asked) == 2
    assert parts.passed == [["a"]]


def test_worker_waits_for_redis() -> None:
    """It reports that it does not claim, and goes on; also with a wrong password, once a claim has succeeded."""
    parts = Parts(AWAY, claimed("a"), WRONG, claimed("b"))
    parts.run()
    assert parts.pauses == [AWAY, WRONG]
    assert parts.counts["reconnect"] == 2, "the notifier may be connected to a server that is a replica now"
    assert parts.passed == [["a"], ["b"]]
    assert parts.observer.claims == [True, False, True, False]


def test_first_claim_with_a_wrong_password_ends_the_worker() -> None:
    """The operator has to change a setting."""
    parts = Parts(WRONG)
    with pytest.raises(FatalError, match="SHIWU_REDIS_URL") as caught:
        parts.run()
    assert caught.value.exit_code is ExitCode.CONFIG
    assert parts.pauses == []


def test_claim_of_a_closing_worker_is_not_passed_on() -> None:
    """`end` gives its jobs back."""
    parts = Parts(claimed("a"))
    claim = parts.queue.claim

    def close_meanwhile(*args: Any, **options: Any) -> ClaimResult:
        found: ClaimResult = claim(*args, **options)
        parts.claimer.close()
        return found

    parts.queue.claim = close_meanwhile
    parts.run()
    assert (parts.passed, parts.observer.claims, parts.released) == ([], [], ["end"])
