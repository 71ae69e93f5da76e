"""`shiwu vectors sink` over the shards of a real cluster: each vector is stored once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from shiwu.broker.sharding import PoolOptions, ShardRedis, by_shard, open_shards
from shiwu.contract import RESULT_STREAM
from shiwu.parts import Objects, open_target
from shiwu.vectors.sink import TEMPORARY, VectorSink
from shiwu_worker.retag.vector_parts import VectorParts
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.vector_answers import GROUP, add_answers, answer_of, expected_ids, sink_process, stored_ids
from tests.support.waiting import wait_until

SHARDS = 6


class Crash(Exception):
    """The process ends here."""


@pytest.fixture
def shards(cluster: ValkeyCluster) -> Iterator[tuple[ShardRedis, ...]]:
    """A client of each shard."""
    clients = open_shards(cluster.url(shards=SHARDS), PoolOptions(timeout_s=2))
    yield clients
    for client in clients:
        client.close()


def add(shards: Sequence[ShardRedis], numbers: range) -> None:
    """Append answers to the streams of their shards."""
    answers = by_shard(map(answer_of, numbers), shards=SHARDS, id_of=lambda answer: answer.id)
    for shard, group in answers.items():
        add_answers(shards[shard], *group)


def open_sink(shards: Sequence[ShardRedis], folder: Path) -> VectorSink:
    """A sink with small parts."""
    target = open_target(str(folder), objects=Objects({}), temporary=TEMPORARY)
    return VectorSink(
        clients=shards,
        acks=shards,
        target=target,
        group=GROUP,
        part_rows=7,
        part_age_s=3600,
        is_stopping_when_idle=True,
    )


def drain(sink: VectorSink) -> None:
    """Store all answers that are there."""
    while not sink.is_at_end:
        sink.step(block_s=0.01)
    sink.record()


def pending(shards: Sequence[ShardRedis]) -> int:
    """How many entries the group has not acknowledged."""
    found: list[Any] = [shard.xpending(RESULT_STREAM, GROUP) for shard in shards]
    return sum(int(each["pending"]) for each in found)


@pytest.mark.parametrize("is_published", [False, True], ids=["staged", "published"])
def test_sink_over_shards_that_ends_anywhere_stores_each_once(
    shards: tuple[ShardRedis, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_published: bool
) -> None:
    """Each shard has parts of its own, which retag can read; the next sink stores what is missing."""
    add(shards, range(120))
    sink, count = open_sink(shards, tmp_path), 0
    real = sink._target.publish

    def crashing(temporary: str, name: str) -> None:
        nonlocal count
        count += 1
        if count < 4 or is_published:
            real(temporary, name)
        if count == 4:
            raise Crash

    monkeypatch.setattr(sink._target, "publish", crashing)
    with pytest.raises(Crash):
        drain(sink)
    assert pending(shards) > 0
    add(shards, range(120, 150))
    drain(open_sink(shards, tmp_path))
    assert stored_ids(tmp_path) == expected_ids(range(150))
    assert pending(shards) == 0
    names = sorted(os.listdir(tmp_path))
    assert {re.sub(r"\d{13}-\d{6}", "TIME", name) for name in names} == {
        f"vectors-{n:03}-TIME.parquet" for n in range(SHARDS)
    }
    assert sum(len(block.vectors) for block in VectorParts(str(tmp_path)).blocks(rows=100)) == 120


def test_command_stores_vectors_of_all_shards(
    cluster: ValkeyCluster, shards: tuple[ShardRedis, ...], tmp_path: Path
) -> None:
    """Until all are stored; everything is acknowledged."""
    add(shards, range(60))
    url = cluster.url(shards=SHARDS)
    with sink_process(url, tmp_path, tmp_path / "out", "--stop-when-idle") as process:
        assert process.wait(timeout_s=60) == 0, process.log_tail()
    assert stored_ids(tmp_path / "out") == expected_ids(range(60))
    assert pending(shards) == 0


def test_node_that_hangs_holds_up_no_other_shard(
    cluster: ValkeyCluster, shards: tuple[ShardRedis, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The vectors of the others are stored meanwhile, and its own when it goes on."""
    add(shards, range(60))
    hanging = cluster.owner(shards[0].shard.slot or 0)
    away = {n for n in range(SHARDS) if cluster.owner(shards[n].shard.slot or 0) == hanging}
    ids = by_shard(expected_ids(range(60)), shards=SHARDS, id_of=str)
    with ExitStack() as stack:
        impatient = open_shards(cluster.url(shards=SHARDS), PoolOptions(timeout_s=0.3))
        for client in impatient:
            stack.enter_context(closing(client))
        sink = open_sink(impatient, tmp_path)
        cluster.server(hanging).pause()
        stack.callback(cluster.server(hanging).resume)
        sink.step(block_s=0.0)
        sink.step(block_s=0.0)
        sink.record()
        assert set(stored_ids(tmp_path)) == {job_id for n, group in ids.items() if n not in away for job_id in group}
        assert not sink.is_at_end
        cluster.server(hanging).resume()
        drain(sink)
    assert stored_ids(tmp_path) == expected_ids(range(60))
    assert pending(shards) == 0


def test_sink_waits_for_shard_0_at_its_start(
    cluster: ValkeyCluster, shards: tuple[ShardRedis, ...], tmp_path: Path
) -> None:
    """It has the number of shards. The sink says which shard it waits for, and stores all vectors in the end."""
    add(shards, range(60))
    first = cluster.server(cluster.owner(shards[0].shard.slot or 0))
    with ExitStack() as stack:
        first.pause()
        stack.callback(first.resume)
        sink = stack.enter_context(
            sink_process(cluster.url(shards=SHARDS), tmp_path, tmp_path / "out", "--stop-when-idle")
        )
        wait_until(lambda: "shard 0: redis_" in sink.log_text(), timeout_s=60, what="a line about the shard")
        first.resume()
        assert sink.wait(timeout_s=60) == 0, sink.log_text()
    assert "shard 0 answers again" in sink.log_text()
    assert stored_ids(tmp_path / "out") == expected_ids(range(60))
