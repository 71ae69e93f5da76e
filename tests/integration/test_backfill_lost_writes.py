"""A backfill of which Redis loses writes that it had acknowledged, as in a failover: each entry still has one row.

The state is set back to what it was some writes before, while the process goes on.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from shiwu.backfill import collector, feeder, runner
from shiwu.backfill.errors import TakenOver, UnusableState
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.runner import Phase
from shiwu.backfill.sources.lines import StandardInput
from shiwu.backfill.state import BackfillState
from shiwu.contract import BACKFILL, BACKFILL_OPEN, COUNTERS, RESULT_STREAM
from tests.support.answering import AnsweringThread
from tests.support.backfills import LocalBackfill, references_of, summary_of, write_list

COUNT: Final = 40
PACE: Final = Pace(part_rows=6)


class Rollback:
    """Sets the state back by `by` writes before the write with the number `at`; 0 stands for that before the take."""

    def __init__(self, client: redis.Redis, patch: pytest.MonkeyPatch) -> None:
        self._redis = client
        self._kept: list[dict[bytes, Any]] = []
        self.at = self.by = 0
        self.was_taken_back = False
        self._take, self._write = BackfillState.take, BackfillState.write
        patch.setattr(BackfillState, "take", lambda *args, **named: self._on_take(*args, **named))  # noqa: PLW0108 binds the state
        patch.setattr(BackfillState, "write", lambda *args: self._on_write(*args))  # noqa: PLW0108 the same

    def plan(self, *, at: int, by: int) -> None:
        """Lose writes once in the next run."""
        self.at, self.by, self.was_taken_back, self._kept = at, by, False, []

    def _on_take(self, state: BackfillState, *args: Any, **named: Any) -> None:
        self._keep(state)
        self._take(state, *args, **named)

    def _on_write(self, state: BackfillState, change: Any) -> str:
        if self.at and len(self._kept) >= self.at:
            self._set_back(self._kept[max(0, len(self._kept) - self.by)])
            self.at, self.was_taken_back = 0, True
        wanted = self._write(state, change)
        self._keep(state)
        return wanted

    def _keep(self, state: BackfillState) -> None:
        keys = [f"{BACKFILL}{state.name}".encode(), f"{BACKFILL_OPEN}{state.name}".encode()]
        self._kept.append({key: self._redis.dump(key) for key in keys})

    def _set_back(self, kept: dict[bytes, Any]) -> None:
        for key, value in kept.items():
            self._redis.delete(key)
            if value is not None:
                self._redis.restore(key, 0, value)


@pytest.fixture
def rollback(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Rollback:
    """Small portions, quick turns, and lost writes."""
    monkeypatch.setattr(feeder, "MAX_PORTION", 10)
    monkeypatch.setattr(runner, "BLOCK_S", 0.01)
    monkeypatch.setattr(collector, "LOOK_UP_IDLE_S", 0.05)
    return Rollback(redis_client, monkeypatch)


@pytest.fixture
def backfill(redis_url: str) -> Iterator[LocalBackfill]:
    """Backfills of which each job is answered."""
    with AnsweringThread(redis_url), LocalBackfill(redis_url) as made:
        yield made


def test_lost_writes_lose_no_row(
    redis_client: redis.Redis, backfill: LocalBackfill, tmp_path: Path, rollback: Rollback
) -> None:
    """One to four writes at each place in a run, also the take: parts, portions and counts are made again."""
    images = write_list(tmp_path / "list.jsonl", COUNT, broken_every=9)
    runs = 0
    for at in range(1, 15):
        for by in (1, 4):
            name, out = f"night-{at}-{by}", tmp_path / f"out-{at}-{by}"
            rollback.plan(at=at, by=by + 1)
            assert backfill.run(name, Plan(str(images), out=str(out)), PACE) is Phase.FINISHED, name
            runs += rollback.was_taken_back
            found = references_of(out)
            assert (len(found), set(found.values())) == (COUNT, {1}), name
            counts = summary_of(out)
            assert (counts["read"], counts["answered"], counts["rows"]) == (COUNT, COUNT, COUNT), name
            assert counts["by_status"] == {"tagged": COUNT - 5, "rejected": 5}
            assert not redis_client.exists(f"{BACKFILL_OPEN}{name}")
            assert int(redis_client.hget(COUNTERS, "answered") or 0) == COUNT * (2 * at - (by == 1))
    assert runs >= 20
    assert redis_client.xinfo_groups(RESULT_STREAM) == []


def test_lost_state_says_what_to_do(
    redis_client: redis.Redis, backfill: LocalBackfill, tmp_path: Path, rollback: Rollback
) -> None:
    """Where not even the plan is left, the process ends with the reason, and not with another one's."""
    images = write_list(tmp_path / "list.jsonl", COUNT)
    rollback.plan(at=4, by=2)
    rollback._kept = [{f"{BACKFILL}night".encode(): None}] * 3
    with pytest.raises(UnusableState, match=r"night: Redis has lost the state .* start it again"):
        backfill.run("night", Plan(str(images)), PACE)
    assert rollback.was_taken_back


def test_lost_writes_with_standard_input_say_what_to_do(
    backfill: LocalBackfill, tmp_path: Path, rollback: Rollback
) -> None:
    """It cannot be read twice, and what was answered meanwhile would have no row under the same name."""
    lines = b"".join(b"s3://b/%05d.jpg\n" % number for number in range(COUNT))
    plan = Plan("-", out=str(tmp_path / "out"))
    rollback.plan(at=4, by=3)
    with pytest.raises(UnusableState, match="start it under another name with the same list"):
        backfill.run("night", plan, PACE, open_the_source=lambda _: StandardInput(io.BytesIO(lines)))
    assert rollback.was_taken_back


def test_backfill_that_another_process_ended_is_not_begun_again(
    backfill: LocalBackfill, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has the higher take, also when it has given up the ownership."""
    plan = Plan(str(write_list(tmp_path / "list.jsonl", COUNT)), out=str(tmp_path / "out"))
    step = feeder.Feeder.step

    def hang(self: feeder.Feeder, *, is_reading: bool) -> bool:
        monkeypatch.undo()
        with LocalBackfill(redis_url) as other:
            assert other.run("night", plan) is Phase.FINISHED
        return step(self, is_reading=is_reading)

    monkeypatch.setattr(feeder.Feeder, "step", hang)
    with pytest.raises(TakenOver):
        backfill.run("night", plan)
    assert set(references_of(tmp_path / "out").values()) == {1}
