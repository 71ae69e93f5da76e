"""The loop of a watcher with stand-ins for its source and its lanes: what it keeps, gives back, repeats and reports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from shiwu.broker.backoff import FIRST_PAUSE_S
from shiwu.broker.redis_errors import NotReplicated
from shiwu.errors import QueueFull
from shiwu.watch import watcher
from shiwu.watch.intake import Message, Plan
from shiwu.watch.sources.base import SourceUnavailable, SourceWrong, Taken
from shiwu.watch.watcher import Watcher

MESSAGE: Taken[int] = (1, Message("m", ()))


@dataclass
class StubSource:
    """Gives portions; an exception among them is raised."""

    portions: list[Sequence[Taken[int]] | Exception]
    stop: threading.Event
    calls: list[str] = field(default_factory=list)
    fails: dict[str, Exception] = field(default_factory=dict)
    name: str = "stub"

    def take(self, count: int, *, wait_s: float) -> Sequence[Taken[int]]:
        """The next portion; stops the watcher after the last one."""
        if not self.portions:
            self.stop.set()
            return []
        portion = self.portions.pop(0)
        if isinstance(portion, Exception):
            raise portion
        return portion

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if error := self.fails.pop(call, None):
            raise error

    def keep(self, taken: Sequence[Taken[int]]) -> None:
        """Noted."""
        self._note("keep")

    def done(self, taken: Sequence[Taken[int]]) -> None:
        """Noted."""
        self._note("done")

    def give_back(self, taken: Sequence[Taken[int]]) -> None:
        """Noted."""
        self._note("give_back")

    def check(self) -> str:
        """Not used."""
        return ""

    def close(self) -> None:
        """Not used."""


@dataclass
class StubLanes:
    """Stands for the intake: raises these errors first, then takes everything."""

    errors: list[Exception]
    on_call: Callable[[], None] = lambda: None
    taken: int = 0

    def plan(self, messages: Any) -> Plan:
        """A plan without events."""
        list(messages)
        return Plan()

    def carry_out(self, plan: Plan) -> None:
        """The next error."""
        self.on_call()
        if self.errors:
            raise self.errors.pop(0)
        self.taken += 1


@dataclass
class Noted:
    """What was reported."""

    source_problems: list[str] = field(default_factory=list)
    lane_problems: list[str] = field(default_factory=list)
    portions: int = 0

    def portion(self, *, messages: int, plan: Plan, duration_s: float) -> None:
        """Counted."""
        self.portions += 1

    def source(self, problem: str = "") -> None:
        """Noted."""
        self.source_problems.append(problem)

    def lanes(self, problem: str = "") -> None:
        """Noted."""
        self.lane_problems.append(problem)


@pytest.fixture
def stop() -> threading.Event:
    """Ends the watcher."""
    return threading.Event()


def run(source: StubSource, lanes: StubLanes, *, is_once: bool = False) -> Noted:
    """Run a watcher to its end."""
    noted = Noted()
    made = Watcher(source, lanes, noted, portion=10, stop=source.stop)  # type: ignore[arg-type]  # a stand-in
    made.run(is_once=is_once)
    return noted


def test_messages_are_kept_while_jobs_wait(stop: threading.Event) -> None:
    """After each try, until the lane takes them; then they are done."""
    source = StubSource([[MESSAGE]], stop)
    lanes = StubLanes([QueueFull("full"), redis.ConnectionError("away"), QueueFull("full")])
    noted = run(source, lanes)
    assert source.calls == ["keep", "keep", "keep", "done"]
    assert (lanes.taken, noted.portions) == (1, 1)
    assert [problem[:10] for problem in noted.lane_problems] == ["full", "redis_away", "full", ""]


def test_unconfirmed_jobs_are_repeated_slowly(stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try puts them into their lane again, so the pauses do not begin short."""
    pauses: list[float | None] = []
    monkeypatch.setattr(stop, "wait", pauses.append)
    source = StubSource([[MESSAGE]], stop)
    noted = run(source, StubLanes([NotReplicated("none"), NotReplicated("none"), QueueFull("full")]))
    assert source.calls == ["keep", "keep", "keep", "done"]
    assert pauses == [watcher.UNCONFIRMED_PAUSE_S, watcher.UNCONFIRMED_PAUSE_S, FIRST_PAUSE_S]
    assert noted.portions == 1


def test_stop_gives_back_what_has_to_wait(stop: threading.Event) -> None:
    """And nothing else is taken."""
    source = StubSource([[MESSAGE], [MESSAGE]], stop)
    noted = run(source, StubLanes([QueueFull("full")] * 99, on_call=stop.set))
    assert source.calls == ["give_back"]
    assert (len(source.portions), noted.portions) == (1, 0)


def test_stop_lets_the_portion_under_way_end(stop: threading.Event) -> None:
    """Its jobs are enqueued, and it is removed."""
    source = StubSource([[MESSAGE], [MESSAGE]], stop)
    run(source, StubLanes([], on_call=stop.set))
    assert (source.calls, len(source.portions)) == (["done"], 1)


def test_unavailable_source_is_asked_again(stop: threading.Event) -> None:
    """Whether it fails when it is asked, while jobs wait, or at the removal."""
    source = StubSource([SourceUnavailable("take"), [MESSAGE], [MESSAGE], [MESSAGE]], stop)
    source.fails = {"keep": SourceUnavailable("keep"), "done": SourceUnavailable("done")}
    noted = run(source, StubLanes([QueueFull("full")]))
    assert source.calls == ["keep", "done", "done", "done"]
    assert [problem for problem in noted.source_problems if problem] == ["take", "keep", "done"]
    assert noted.portions == 3  # the jobs of the first one are enqueued, though it may come again


def test_error_that_time_does_not_cure_ends_the_watcher(stop: threading.Event) -> None:
    """Of the source or of the lanes."""
    with pytest.raises(SourceWrong):
        run(StubSource([SourceWrong("x")], stop), StubLanes([]))
    source = StubSource([[MESSAGE]], stop)
    with pytest.raises(redis.AuthenticationError):
        run(source, StubLanes([redis.AuthenticationError("no")]))
    assert source.calls == []


def test_once_ends_at_an_empty_source(stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for further messages."""
    monkeypatch.setattr(watcher, "WAIT_S", 99.0)
    source = StubSource([[MESSAGE], [MESSAGE], [], [MESSAGE]], stop)
    noted = run(source, StubLanes([]), is_once=True)
    assert (noted.portions, len(source.portions)) == (2, 1)
