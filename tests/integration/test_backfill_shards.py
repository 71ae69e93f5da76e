"""A backfill over the shards of a real cluster: what is promised on one server holds there."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner

from shiwu.backfill import collector, feeder, runner
from shiwu.backfill.plan import Pace, Plan
from shiwu.backfill.runner import Phase
from shiwu.backfill.state import BackfillState
from shiwu.broker.sharding import ShardRedis
from shiwu.cli import main
from shiwu.contract import BACKFILL, BACKFILL_OPEN, BACKFILLS, COUNTERS, RESULT_STREAM, Lane
from shiwu.parts.targets import FolderTarget
from tests.support.answering_shards import AnsweringShards
from tests.support.backfills import BackfillProcess, LocalBackfill, references_of, summary_of, write_list
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

SHARDS: Final = 6
LANE: Final = Lane.BULK.keys[0]


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True)
def _quick_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BLOCK_S", 0.01)
    monkeypatch.setattr(runner, "CONTROL_EVERY_S", 0.05)
    monkeypatch.setattr(collector, "LOOK_UP_IDLE_S", 0.1)


@pytest.fixture
def url(cluster: ValkeyCluster) -> str:
    """What the command is given."""
    return cluster.url(shards=SHARDS)


@pytest.fixture
def backfill(url: str) -> Iterator[LocalBackfill]:
    """Backfills over the shards, which give up a node that hangs soon."""
    with LocalBackfill(url, timeout_s=0.5) as made:
        yield made


def shiwu(url: str, *args: str) -> str:
    """Standard output of `shiwu backfill …`, which must succeed."""
    done = CliRunner().invoke(main, ["--redis-url", url, "backfill", *args])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_command_tags_a_list_over_all_shards(url: str, shards: tuple[ShardRedis, ...], tmp_path: Path) -> None:
    """Its state is in the first shard; another pass sends only what is new, and no group is left."""
    images = write_list(tmp_path / "list.jsonl", 200, broken_every=50)
    out = tmp_path / "out"
    with AnsweringShards(url):
        shiwu(url, "start", "night", str(images), "--out", str(out))
        assert [bool(shard.exists(f"{BACKFILL}night", BACKFILLS)) for shard in shards] == [True] + [False] * 5
        assert references_of(out) == Counter(f"s3://b/{n:05}{'-broken' * (n % 50 == 0)}.jpg" for n in range(200))
        write_list(images, 230, broken_every=50)
        shiwu(url, "start", "night", str(images), "--out", str(out), "--missing")
    assert len(references_of(out)) == 230
    assert summary_of(out)["by_status"] == {"tagged": 225, "rejected": 5}
    assert '"phase":"finished"' in shiwu(url, "status", "night", "--json")
    answered = [int(shard.hget(COUNTERS, "answered") or 0) for shard in shards]
    assert sum(answered) == 230
    assert min(answered) > 0
    assert [shard.xinfo_groups(RESULT_STREAM) for shard in shards] == [[]] * SHARDS


def test_each_crash_over_shards_loses_no_row(
    url: str, shards: tuple[ShardRedis, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends before or after each kind of effect, once in its course; the next run makes up for it."""
    effects: list[tuple[Any, str]] = [
        (BackfillState, "write"),
        (feeder, "run"),
        (collector.Collector, "_acknowledge"),
        (collector.Collector, "make_group"),
        (collector.Collector, "drop_group"),
        (FolderTarget, "publish"),
    ]
    monkeypatch.setattr(feeder, "MAX_PORTION", 10)
    at: dict[str, bool] = {}
    """Name of the effect → whether the crash comes after it; emptied by the crash."""

    def crashing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*args: Any, **named: Any) -> Any:
            if at.get(name) is False:
                at.clear()
                raise Crash
            found = real(*args, **named)
            if at.pop(name, False):
                raise Crash
            return found

        return effect

    for owner, name in effects:
        monkeypatch.setattr(owner, name, crashing(name, getattr(owner, name)))
    images = write_list(tmp_path / "list.jsonl", 40)
    with AnsweringShards(url), LocalBackfill(url) as backfill:
        for (_, name), is_after in itertools.product(effects, [False, True]):
            label = f"{name}-{is_after}"
            plan = Plan(str(images), out=str(tmp_path / label))
            at[name] = is_after
            with pytest.raises(Crash):
                backfill.run(label, plan, Pace(part_rows=12))
            assert backfill.run(label, plan, Pace(part_rows=12)) is Phase.FINISHED, label
            found = references_of(tmp_path / label)
            assert (len(found), set(found.values())) == (40, {1}), label
            assert not shards[0].exists(f"{BACKFILL_OPEN}{label}")


def test_shard_that_is_away_is_waited_for(
    cluster: ValkeyCluster,
    backfill: LocalBackfill,
    url: str,
    shards: tuple[ShardRedis, ...],
    tmp_path: Path,
) -> None:
    """A node that holds no state is stopped and goes on: the answers of the others are collected meanwhile."""
    held = cluster.owner(shards[0].shard.slot or 0)
    stopped = cluster.other_than(held)
    away = {index for index in range(SHARDS) if cluster.owner(shards[index].shard.slot or 0) == stopped}
    plan = Plan(str(write_list(tmp_path / "list.jsonl", 300)), out=str(tmp_path / "out"))
    ended: list[Phase] = []
    run = threading.Thread(target=lambda: ended.append(backfill.run("night", plan)))
    run.start()
    wait_until(lambda: sum(shard.llen(LANE) for shard in shards) == 300, timeout_s=20)
    of_others = 300 - sum(shards[index].llen(LANE) for index in away)
    cluster.server(stopped).pause()
    try:
        with AnsweringShards(url):
            wait_until(lambda: backfill.shown[-1].answered >= of_others, timeout_s=60)
            assert not ended
            cluster.server(stopped).resume()
            wait_until(lambda: ended, timeout_s=60)
    finally:
        cluster.server(stopped).resume()
        run.join(timeout=60)
    assert ended == [Phase.FINISHED]
    assert set(references_of(tmp_path / "out").values()) == {1}
    assert len(references_of(tmp_path / "out")) == 300


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_kills_over_shards_lose_no_row(
    cluster: ValkeyCluster, url: str, shards: tuple[ShardRedis, ...], tmp_path: Path
) -> None:
    """The command is killed ten times at random while 5,000 images are tagged; a node hangs, and a slot moves."""
    images = write_list(tmp_path / "list.jsonl", 5000)
    out, chance, pause = tmp_path / "out", random.Random(20261201), threading.Event()
    args = ["start", "night", str(images), "--out", str(out), "--part-rows", "300", "--rate", "400/s"]
    moved, killed = shards[1].shard.slot or 0, 0
    with AnsweringShards(url), BackfillProcess(*args, redis_url=url, folder=tmp_path) as run:
        for number in range(10):
            until_s = time.monotonic() + chance.uniform(0.8, 2.5)
            while time.monotonic() < until_s and run.is_running:
                pause.wait(0.01)
            if number == 3:
                hanging = cluster.server(cluster.owner(shards[0].shard.slot or 0))
                hanging.pause()
                pause.wait(3.0)
                hanging.resume()
            if number == 6:
                cluster.move_atomically(moved, to=cluster.other_than(cluster.owner(moved)))
            if run.is_running:
                run.kill()
                killed += 1
                run.start()
        assert run.wait(timeout_s=120) == 0, run.log_tail()
    assert killed >= 5
    found = references_of(out)
    assert (len(found), set(found.values())) == (5000, {1})
    assert sum(int(shard.hget(COUNTERS, "answered") or 0) for shard in shards) == 5000
    assert [shard.xinfo_groups(RESULT_STREAM) for shard in shards] == [[]] * SHARDS
