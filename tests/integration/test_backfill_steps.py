"""A backfill that ends before or after each of its effects in turn: the next run makes up for it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from shiwu.backfill import collector, feeder, runner
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.runner import Phase
from shiwu.backfill.state import BackfillState
from shiwu.contract import COUNTERS, RESULT_STREAM
from shiwu.parts.targets import FolderTarget
from tests.support.answering import AnsweringThread
from tests.support.backfills import LocalBackfill, references_of, summary_of, write_list

COUNT: Final = 40
MAX_NTH: Final = 7
"""Of each effect so many calls are tried, if a run makes them."""
EFFECTS: Final[list[tuple[Any, str]]] = [
    (BackfillState, "write"),
    (BackfillState, "take"),
    (BackfillState, "expire"),
    (feeder, "run"),  # sends a portion
    (collector.Collector, "_acknowledge"),
    (collector.Collector, "make_group"),
    (collector.Collector, "drop_group"),
    (FolderTarget, "stage"),
    (FolderTarget, "publish"),
    (FolderTarget, "put"),
]


class Crash(BaseException):
    """The process ends here."""


class Crashes:
    """Ends the run before or after the effect with this name and number."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at: tuple[str, int] | None = None
        self.is_after = False
        self.names: Counter[str] = Counter()
        for owner, name in EFFECTS:
            patch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*args: Any, **named: Any) -> Any:
            self.names[name] += 1
            is_here = self.at == (name, self.names[name])
            if is_here and not self.is_after:
                raise Crash
            found = real(*args, **named)
            if is_here:
                raise Crash
            return found

        return effect


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crashes]:
    """Small portions, quick turns, and crashes."""
    monkeypatch.setattr(feeder, "MAX_PORTION", 10)
    monkeypatch.setattr(runner, "BLOCK_S", 0.01)
    monkeypatch.setattr(collector, "LOOK_UP_IDLE_S", 0.05)
    return Crashes(monkeypatch)


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
def test_crash_at_each_effect_loses_no_row(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, crashes: Crashes, is_after: bool
) -> None:
    """Each in a backfill of its own, with a line that cannot be a job and with an image twice."""
    images = write_list(tmp_path / "list.jsonl", COUNT, broken_every=9)
    with images.open("a") as file:
        file.write('{"image": "s3://b/00003.jpg"}\n{"image": "ftp://b/x.jpg"}\n')
    crashed = Counter[str]()
    number = 0
    with AnsweringThread(redis_url), LocalBackfill(redis_url) as backfill:
        for (_, name), nth in itertools.product(EFFECTS, range(1, MAX_NTH + 1)):
            number += 1
            out = tmp_path / f"out-{number}"
            plan, pace = Plan(str(images), out=str(out)), Pace(part_rows=12)
            crashes.names, crashes.at, crashes.is_after = Counter(), (name, nth), is_after
            try:
                phase = backfill.run(f"night-{number}", plan, pace)
            except Crash:
                crashed[name] += 1
                crashes.at = None
                phase = backfill.run(f"night-{number}", plan, pace)
            assert phase is Phase.FINISHED, (name, nth)
            _check(redis_client, out, number)
    assert crashed.keys() == {name for _, name in EFFECTS}
    assert crashed["write"] == MAX_NTH
    assert (crashed["stage"], crashed["publish"]) == (4, 6)  # parts of 12 rows, manifest and summary
    assert int(redis_client.hget(COUNTERS, "answered") or 0) == COUNT * number


def _check(client: redis.Redis, out: Path, number: int) -> None:
    found = references_of(out)
    assert len(found) == COUNT + 1
    assert set(found.values()) == {1}
    counts = summary_of(out)
    assert (counts["read"], counts["repeated"], counts["answered"], counts["rows"]) == (COUNT + 2, 1, *[COUNT + 1] * 2)
    assert counts["by_status"] == {"tagged": COUNT - 5, "rejected": 6}
    assert client.xinfo_groups(RESULT_STREAM) == []
    assert not client.exists(f"shiwu:backfill:open:night-{number}")
