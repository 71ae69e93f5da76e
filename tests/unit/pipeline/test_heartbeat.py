"""What a heartbeat does at each tick, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError
from structlog.testing import capture_logs

from shiwu.broker.foreign_values import ForeignValue
from shiwu.broker.maintenance import CHUNK_SIZE, MAX_ROUNDS, MaintenanceReport
from shiwu_worker.pipeline import heartbeat as module
from shiwu_worker.pipeline.heartbeat import TICK_S, Heartbeat, ShardDuties
from shiwu_worker.runtime.progress import LoadMeter, Progress
from shiwu_worker.telemetry.metrics import DUTIES
from tests.support.clock import Clock
from tests.support.observers import RecordingObserver

FULL = MaintenanceReport(reaped=CHUNK_SIZE)


class Parts:
    """A heartbeat whose clock the test moves, over parts that keep what they are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lease_s: float = 30.0, stuck_s: float = 10.0) -> None:
        self.clock = Clock()
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        self.progress, self.observer = Progress(clock=self.clock.monotonic), RecordingObserver()
        self.held: list[str] = []
        self.renewals: list[list[str]] = []
        self.lost: list[str] = []
        self.reports: list[MaintenanceReport] = []
        self.rounds: list[dict[str, Any]] = []
        self.trimmed: list[MaintenanceReport] = []
        self.foreign: list[ForeignValue] = []
        self.dropped: dict[str, int] = {}
        self.quarantine_calls = 0
        self.waits: list[object] = []
        self.resets = 0
        maintenance: Any = SimpleNamespace(
            run_once=self._run_once, trim_if_long=self._trim, move_foreign=lambda: self.foreign
        )
        lease_queue: Any = SimpleNamespace(renew=self._renew)
        backoff: Any = SimpleNamespace(wait=lambda error, _: self.waits.append(error), reset=self._reset)
        self.heartbeat = Heartbeat(
            lease_queue,
            maintenance,
            lease_s=lease_s,
            in_flight=self.held,
            progress=self.progress,
            meter=LoadMeter(loader_threads=1),
            stuck_s=lambda: stuck_s,
            on_quarantine=self._note_quarantine,
            observer=self.observer,
            backoff=backoff,
            on_fatal=pytest.fail,
        )

    def _run_once(self, **options: Any) -> MaintenanceReport:
        self.rounds.append(options)
        return self.reports.pop(0) if self.reports else MaintenanceReport()

    def _trim(self, report: MaintenanceReport) -> dict[str, int]:
        self.trimmed.append(report)
        return self.dropped

    def _renew(self, ids: list[str]) -> list[str]:
        self.renewals.append(ids)
        return self.lost

    def _note_quarantine(self) -> None:
        self.quarantine_calls += 1

    def _reset(self) -> None:
        self.resets += 1

    def tick(self, error: Exception | None = None) -> list[float | None]:
        """Let the thread's loop run once, with this result of its duties; the pauses that it asked for."""
        pauses: list[float | None] = []
        states = iter([False, True])
        self.heartbeat._closed = SimpleNamespace(  # type: ignore[assignment]  # what the loop uses of it
            is_set=lambda: next(states), wait=pauses.append
        )
        if error is not None:
            self.heartbeat._duties = SimpleNamespace(run=lambda: error)  # type: ignore[assignment]  # what the loop uses of it
        self.heartbeat._run()
        return pauses


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A heartbeat with a lease of 30 s, that is stuck after 10 s."""
    return Parts(monkeypatch)


@pytest.mark.parametrize(
    ("error", "is_available"),
    [(None, True), (NoPermissionError("no"), True), (redis.ConnectionError("away"), False)],
)
def test_tick_reports_whether_redis_answers(parts: Parts, error: Exception | None, *, is_available: bool) -> None:
    """A server that refuses one command has answered; either error is followed by a pause of its own."""
    pauses = parts.tick(error)
    assert parts.observer.redis == [is_available]
    assert (parts.waits, parts.resets) == (([], 1) if error is None else ([error], 0))
    assert pauses == [TICK_S]


@pytest.mark.parametrize(("lease_s", "tick_s"), [(60.0, 1.0), (6.0, 1.0), (3.0, 0.5)])
def test_ticks_are_shorter_than_a_renewal(monkeypatch: pytest.MonkeyPatch, lease_s: float, tick_s: float) -> None:
    """Once a second, or six times in a lease."""
    assert Parts(monkeypatch, lease_s=lease_s).tick() == [tick_s]


def test_leases_are_renewed_every_third_of_their_time(parts: Parts) -> None:
    """All that are held; the observer counts those that were not lost."""
    parts.held[:] = ["a", "b", "c"]
    parts.clock.now_s += 9.9
    parts.heartbeat._prove_progress()
    assert (parts.renewals, parts.observer.alive_count) == ([], 1)
    parts.clock.now_s += 0.1
    parts.lost = ["b"]
    with capture_logs() as logs:
        parts.heartbeat._prove_progress()
        parts.heartbeat._prove_progress()
    assert (parts.renewals, parts.observer.renewed) == ([["a", "b", "c"]], [2])
    assert [line["event"] for line in logs] == ["leases_lost"]
    parts.clock.now_s += 5.0
    parts.progress.mark()
    parts.clock.now_s += 5.0
    parts.lost = []
    with capture_logs() as logs:
        parts.heartbeat._prove_progress()
    assert (len(parts.renewals), parts.observer.renewed, logs) == (2, [2, 3], [])


@pytest.mark.parametrize(
    ("idle_s", "held", "waiting", "is_stuck"),
    [
        (10.0, 1, 0, False),
        (10.1, 1, 0, True),
        (10.1, 0, 1, True),
        (10.1, 0, 0, False),
        (0.0, 1, 1, False),
    ],
)
def test_worker_with_work_and_no_progress_is_stuck(
    parts: Parts, idle_s: float, held: int, waiting: int, *, is_stuck: bool
) -> None:
    """Jobs that it holds are work, and messages in the lanes."""
    parts.held[:] = ["job"] * held
    parts.reports = [MaintenanceReport(waiting=waiting)]
    parts.heartbeat._run_maintenance()
    parts.clock.now_s += idle_s
    with capture_logs() as logs:
        parts.heartbeat._prove_progress()
    assert parts.observer.alive_count == (not is_stuck)
    assert [line["event"] for line in logs] == ["worker_stuck"] * is_stuck
    assert parts.renewals == ([] if is_stuck or idle_s < 10 else [["job"] * held])


def test_stuck_worker_is_logged_every_so_often(parts: Parts) -> None:
    """Immediately, also in the first seconds of the machine, and again after the same time."""
    parts.clock.now_s = 10.5
    parts.progress._last_s = 0.0
    parts.held.append("job")
    counts = []
    for seconds in (0.0, 1.0, 8.9, 0.1, 1.0):
        parts.clock.now_s += seconds
        with capture_logs() as logs:
            assert parts.heartbeat._is_stuck()
        counts.append(len(logs))
    assert counts == [1, 0, 0, 1, 0]


@pytest.mark.parametrize(("idle_s", "is_counted"), [(5.0, False), (5.1, True)])
def test_lanes_are_counted_while_the_worker_is_quiet(parts: Parts, idle_s: float, *, is_counted: bool) -> None:
    """From half the time on after which it would be stuck; counting costs the server time."""
    parts.clock.now_s += idle_s
    parts.heartbeat._run_maintenance()
    assert parts.rounds == [{"limit": 500, "count_waiting": is_counted}]


def test_only_watchers_do_the_maintenance_of_a_shard(parts: Parts) -> None:
    """Another worker does none of it, unless it makes no progress: then it counts what waits."""
    noted: list[bool] = []
    parts.heartbeat._shard = ShardDuties(
        index=3,
        ids=list,
        report_redis=lambda _: None,
        waiting={3: 5},
        note_worker=lambda: noted.append(True),
        is_watched=lambda: False,
    )
    parts.foreign = [ForeignValue(key="shiwu.bulk", type="string", moved_to="x")]
    parts.heartbeat._move_foreign()
    parts.heartbeat._run_maintenance()
    assert (parts.rounds, parts.observer.foreign, parts.heartbeat._shard.waiting) == ([], [], {3: 0})
    parts.clock.now_s += 5.1
    parts.heartbeat._run_maintenance()
    assert parts.rounds == [{"limit": 500, "count_waiting": True}]


@pytest.mark.parametrize("full", [0, 1, 3, MAX_ROUNDS])
def test_rounds_follow_each_other_while_they_are_full(parts: Parts, full: int) -> None:
    """Up to a bound; the last report says what to trim."""
    last = MaintenanceReport(waiting=7)
    parts.reports = [FULL] * full + [last]
    with capture_logs() as logs:
        parts.heartbeat._run_maintenance()
    rounds = min(full + 1, MAX_ROUNDS)
    assert len(parts.rounds) == rounds
    assert [line["event"] for line in logs] == ["jobs_reaped"] * full
    assert parts.observer.reaped == [CHUNK_SIZE] * full
    parts.heartbeat._trim()
    assert parts.trimmed == [FULL if rounds <= full else last]


def test_nothing_is_trimmed_before_the_first_maintenance(parts: Parts) -> None:
    """An empty report, which finds nothing too long; what consumers lose is logged."""
    parts.dropped = {"mine": 3}
    with capture_logs() as logs:
        parts.heartbeat._trim()
    assert parts.trimmed == [MaintenanceReport()]
    assert [(line["event"], line["group"], line["entries"]) for line in logs] == [("results_dropped", "mine", 3)]


def test_report_of_maintenance_is_passed_on(parts: Parts) -> None:
    """Quarantined jobs wake the claim, and answers for jobs out of time are logged; where there are none, nothing."""
    parts.reports = [MaintenanceReport(), MaintenanceReport(quarantined=1, out_of_time=2)]
    with capture_logs() as logs:
        parts.heartbeat._run_maintenance()
        assert (parts.quarantine_calls, logs) == (0, [])
        parts.heartbeat._run_maintenance()
    assert parts.quarantine_calls == 1
    assert [(line["event"], line["jobs"]) for line in logs] == [("jobs_out_of_time", 2)]
    assert parts.observer.reaped == []


def test_moved_values_are_counted_and_named(parts: Parts) -> None:
    """None, where there are none. A duty that fails is a reason to check immediately."""
    parts.heartbeat._move_foreign()
    assert parts.observer.foreign == []
    parts.foreign = [ForeignValue(key="shiwu.bulk", type="string", moved_to="x")]
    parts.heartbeat._move_foreign()
    assert parts.observer.foreign == [], "types are checked every ten seconds"
    parts.heartbeat._on_duty_failed("maintenance")
    with capture_logs() as logs:
        parts.heartbeat._move_foreign()
    assert parts.observer.foreign == [1]
    assert [(line["event"], line["key"]) for line in logs] == [("foreign_value_moved", "shiwu.bulk")]


def test_all_duties_run_in_their_order(parts: Parts) -> None:
    """Wrong types are moved before anything else; without the leases the process must not go on."""
    duties = parts.heartbeat._duties._duties
    names = ["foreign_values", "leases", "watchers", "maintenance", "trim", "load_log", "worker_state"]
    assert [duty.name for duty in duties] == names
    assert [duty.name for duty in duties if duty.is_vital] == ["leases"]
    assert (*names, "gpu", "queue_metrics") == DUTIES, "each has a series before its first failure"
    parts.tick()
    assert (parts.observer.alive_count, len(parts.rounds), len(parts.trimmed)) == (1, 1, 1)


def test_new_worker_without_work_is_not_stuck(parts: Parts) -> None:
    """Before the first maintenance it knows of no messages."""
    parts.clock.now_s += 1e6
    assert not parts.heartbeat._is_stuck()
