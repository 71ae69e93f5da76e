"""A turn of a system in a benchmark."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from bench import traffic, turns
from bench.turns import MIN_JOBS_AHEAD, TRIES, Player


def player(monkeypatch: pytest.MonkeyPatch, *, answers: int) -> tuple[Player, list[int]]:
    """A system that answers so many jobs in each turn, and the numbers of jobs that it was sent."""
    lane, arrivals, sent = [0], list[str](), list[int]()
    jobs = SimpleNamespace(id="t")
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    monkeypatch.setattr(traffic, "build", lambda *_, count, **__: [jobs] * count)

    def send(*_: Any) -> None:
        sent.append(len(_[2]))
        lane[0] += len(_[2])

    monkeypatch.setattr(traffic, "send", send)

    def pause() -> None:
        done = min(answers, lane[0])
        lane[0] -= done
        arrivals.extend(["t"] * done)

    client = SimpleNamespace(llen=lambda _: lane[0])
    place = SimpleNamespace(
        client=client, lane=SimpleNamespace(queue="bulk"), source=SimpleNamespace(references=["file:///a.jpg"])
    )
    running = SimpleNamespace(cpu_s=lambda: (0.0, 0.0), check=lambda: None)
    busy = SimpleNamespace(busy_percent=0.0)
    watch = SimpleNamespace(samples=lambda: 0, since=lambda _: busy)
    system: Any = Player(place, running, SimpleNamespace(arrivals=arrivals), watch, per_second=1.0)  # type: ignore[arg-type]  # stubs
    monkeypatch.setattr(system, "resume", lambda: None)
    monkeypatch.setattr(system, "pause", pause)
    return system, sent


def test_turn_is_repeated_where_the_lane_ran_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that is faster than its warm-up would otherwise end the benchmark."""
    system, sent = player(monkeypatch, answers=2 * MIN_JOBS_AHEAD)
    assert system.turn(0.001).pictures == 2 * MIN_JOBS_AHEAD
    assert len(sent) > 1


def test_lane_that_always_runs_empty_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rate would be that of the sender."""
    system, sent = player(monkeypatch, answers=10**9)
    with pytest.raises(RuntimeError, match="too few"):
        system.turn(0.001)
    assert len(sent) == TRIES
