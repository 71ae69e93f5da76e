"""What maintenance makes of the replies of its scripts, without a server."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from shiwu.broker import maintenance as module
from shiwu.broker.foreign_values import ForeignValue
from shiwu.broker.maintenance import CHUNK_SIZE, MAX_ROUNDS, MAX_TRIM, Maintenance, MaintenanceReport, SweepReport
from shiwu.broker.retention import Retention
from shiwu.contract import COUNTERS, DEAD_ANSWERS, DEAD_MESSAGES, RESULT_STREAM

LIMITS = Retention(stream_length=10, stream_bytes=1000, dead_bytes=500)
NOTHING = SweepReport(reaped=0, promoted=0, out_of_time=0, expired=0, results_dropped={})


class Parts:
    """Maintenance whose scripts and commands give what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, list[Any], list[Any]]] = []
        self.replies: dict[str, list[Any]] = {}
        self.sizes: dict[str, int | None] = {}
        self.errors: dict[str, Exception] = {}
        self.measured: list[str] = []
        self.stored: list[tuple[str, str, int]] = []
        monkeypatch.setattr(module, "load_script", self._load)
        monkeypatch.setattr(module, "load_repeatable_script", self._load)
        client: Any = SimpleNamespace(memory_usage=self._measure, hset=self._store, register_script=lambda _: None)
        answer_store: Any = SimpleNamespace()
        self.maintenance = Maintenance(client, answer_store, name="w", token="t", retention=lambda: LIMITS)
        self.expiry: Any = SimpleNamespace(scanned_ms=7.0, answer_due=self._answer_due, scan=self._scan)
        self.due: list[dict[bytes, bytes]] = []
        self.scans = 0
        self.maintenance._expiry = self.expiry

    def _load(self, _: Any, name: str) -> Any:
        def run(*, keys: list[Any], args: list[Any]) -> Any:
            self.calls.append((name, list(keys), list(args)))
            return self.replies[name].pop(0)

        return run

    def _measure(self, key: str, samples: int) -> int | None:
        assert samples == 0, "all of it"
        if "memory_usage" in self.errors:
            raise self.errors["memory_usage"]
        self.measured.append(key)
        return self.sizes.get(key)

    def _store(self, key: str, field: str, value: int) -> None:
        if "hset" in self.errors:
            raise self.errors["hset"]
        self.stored.append((key, field, value))

    def _answer_due(self, records: dict[bytes, bytes], **_: Any) -> int:
        self.due.append(records)
        return len(records)

    def _scan(self, **_: Any) -> int:
        self.scans += 1
        return 5

    def names(self) -> list[str]:
        """The scripts that ran."""
        return [name for name, _, _ in self.calls]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Maintenance of one worker."""
    return Parts(monkeypatch)


def test_reports_begin_with_nothing() -> None:
    """A figure that was not counted is 0."""
    assert set(astuple(MaintenanceReport())) == {0}
    assert (NOTHING.not_looked_at, NOTHING.foreign, NOTHING.did_something) == (0, (), False)


@pytest.mark.parametrize("name", [field.name for field in fields(MaintenanceReport)])
def test_full_report_may_have_left_more(name: str) -> None:
    """Of the kinds that a round does up to its limit."""
    is_bounded = name in {"reaped", "promoted", "deadlines_due"}
    assert MaintenanceReport(**{name: CHUNK_SIZE}).is_full is is_bounded
    assert not MaintenanceReport(**{name: CHUNK_SIZE - 1}).is_full


@pytest.mark.parametrize("name", ["reaped", "promoted", "out_of_time", "expired", "results_dropped", "foreign"])
def test_sweep_that_changed_anything_did_something(name: str) -> None:
    """Each kind of change by itself; messages that are left for later are none."""
    values: dict[str, Any] = {"results_dropped": {"g": 1}, "foreign": (ForeignValue("k", "set", "m"),)}
    assert replace(NOTHING, **{name: values.get(name, 1)}).did_something
    assert not replace(NOTHING, not_looked_at=1).did_something


@pytest.mark.parametrize("is_scanning", [0, 1])
def test_round_reports_what_the_script_counted(parts: Parts, is_scanning: int) -> None:
    """Each figure in its place, and answers of a scan only where this process owns it."""
    parts.replies["maintain"] = [[1, 2, 3, 4, 5, 6, 1000, 7, 8, is_scanning, [b"a", b"x", b"b", b"y"]]]
    report = parts.maintenance.run_once(limit=9)
    assert report == MaintenanceReport(
        reaped=1,
        promoted=2,
        quarantined=3,
        waiting=4,
        stream_length=5,
        stream_bytes=7,
        dead_bytes=8,
        out_of_time=2 + 5 * is_scanning,
        deadlines_due=6,
    )
    assert (parts.due, parts.scans) == ([{b"a": b"x", b"b": b"y"}], is_scanning)
    [(_, _, args)] = parts.calls
    lease_ms, age_ms, reserved_ms, scan_ms = 600_000, LIMITS.dead_age_s * 1000, 60_000, 15_000
    assert args[:3] == ["w", 9, 0]
    assert [args[4], args[5], args[7], args[10]] == [lease_ms, age_ms, reserved_ms, scan_ms]
    assert args[8:10] == ["t", 7.0]


@pytest.mark.parametrize("full", [0, 2, MAX_ROUNDS])
def test_sweep_goes_on_while_rounds_are_full(parts: Parts, full: int) -> None:
    """Up to a bound; figures of all rounds are added up, and two kinds of expired messages."""
    parts.replies["maintain"] = [[CHUNK_SIZE, 1, 0, 0, 0, 0, 0, 0, 0, 0, [b"a", b"x"]] for _ in range(full)]
    parts.replies["maintain"].append([2, 1, 0, 0, 0, 0, 0, 0, 0, 0, []])
    parts.expiry.expire_waiting = lambda **_: (3, 11)
    parts.expiry.expire_quarantined = lambda **_: 4
    parts.maintenance._measured |= {"dead_bytes", "results_bytes"}
    foreign = [ForeignValue("k", "set", "m")]
    parts.maintenance._foreign_values = SimpleNamespace(move=lambda: foreign)  # type: ignore[assignment]  # all of it
    report = parts.maintenance.sweep()
    rounds = min(full + 1, MAX_ROUNDS)
    reaped = CHUNK_SIZE * full + (2 if full < MAX_ROUNDS else 0)
    expected = SweepReport(
        reaped=reaped, promoted=rounds, out_of_time=full, expired=7, results_dropped={}, not_looked_at=11
    )
    assert report == replace(expected, foreign=foreign)
    assert len(parts.calls) == rounds


def test_trimmed_groups_are_named_with_their_losses(parts: Parts) -> None:
    """The reply begins with another figure; a name that is no UTF-8 is shown as far as it can be."""
    parts.replies["trim"] = [[9, b"a", 1, b"b\xff", 2], [0]]
    assert parts.maintenance.trim() == {"a": 1, "b�": 2}
    assert parts.maintenance.trim(bytes_over=3) == {}
    assert [args for _, _, args in parts.calls] == [[10, MAX_TRIM, 0], [10, MAX_TRIM, 3]]


@pytest.mark.parametrize(("length", "is_trimmed"), [(10, False), (11, True)])
def test_long_stream_is_trimmed(parts: Parts, length: int, *, is_trimmed: bool) -> None:
    """From the first entry over its limit on; the sizes were measured before."""
    parts.maintenance._measured |= {"dead_bytes", "results_bytes"}
    parts.replies["trim"] = [[0, b"g", 4]]
    dropped = parts.maintenance.trim_if_long(MaintenanceReport(stream_length=length, stream_bytes=1000, dead_bytes=500))
    assert dropped == ({"g": 4} if is_trimmed else {})
    assert (parts.names(), parts.measured) == (["trim"] * is_trimmed, [])


def test_large_keys_are_measured_before_anything_is_dropped(parts: Parts) -> None:
    """Once at the start, and then where the count exceeds the limit; the count is corrected."""
    parts.sizes = {RESULT_STREAM: 1000, DEAD_ANSWERS: 300, DEAD_MESSAGES: None}
    assert parts.maintenance.trim_if_long(MaintenanceReport()) == {}
    assert (parts.measured, parts.names()) == ([DEAD_ANSWERS, DEAD_MESSAGES, RESULT_STREAM], [])
    assert parts.stored == [(COUNTERS, "dead_bytes", 300), (COUNTERS, "results_bytes", 1000)]
    assert parts.maintenance.trim_if_long(MaintenanceReport(stream_bytes=1000, dead_bytes=500)) == {}
    assert len(parts.measured) == 3
    parts.sizes = {RESULT_STREAM: 1007, DEAD_ANSWERS: 300, DEAD_MESSAGES: 205}
    parts.replies |= {"trim": [[0, b"g", 1]], "trim_dead": [[6, 0]]}
    assert parts.maintenance.trim_if_long(MaintenanceReport(stream_bytes=1001, dead_bytes=501)) == {"g": 1}
    assert [(name, args) for name, _, args in parts.calls] == [
        ("trim_dead", [5, MAX_TRIM]),
        ("trim", [10, MAX_TRIM, 7]),
    ]


def test_number_of_dropped_letters_is_returned(parts: Parts) -> None:
    """The first figure of the reply."""
    parts.replies["trim_dead"] = [[6, 9]]
    assert parts.maintenance.trim_dead(bytes_over=5) == 6


@pytest.mark.parametrize(("command", "over"), [("memory_usage", 0), ("hset", 7)])
def test_refused_measurement_drops_nothing(parts: Parts, command: str, over: int) -> None:
    """The count alone would drop too much. Where only the count cannot be corrected, the measured size holds."""
    parts.errors[command] = redis.ResponseError("no")
    parts.sizes = {RESULT_STREAM: 1007}
    assert parts.maintenance._bytes_over("results_bytes", (RESULT_STREAM,), 2000, 1000) == over


def test_expired_messages_are_counted_without_the_rest(parts: Parts) -> None:
    """How many were not checked is only for the sweep."""
    parts.expiry.expire_waiting = lambda **_: (3, 11)
    assert parts.maintenance.expire_waiting() == 3
