"""`shiwu top` over the shards of a real cluster: sums, a row for each shard, and a node that hangs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from click.testing import CliRunner
from textual.pilot import Pilot

from shiwu import Client
from shiwu.broker.sharding import PoolOptions, by_shard, open_shards
from shiwu.broker.worker_state import write_worker_state
from shiwu.cli import main
from shiwu.contract import WORKERS, Lane
from shiwu.top.app import TopApp
from shiwu.top.shards import ShardsReader
from tests.support import top_states
from tests.support.answering_shards import AnsweringShards
from tests.support.top_screens import run_screen, wait_screen
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

SHARDS = 6
ANSWERED = [f"done{number}" for number in range(60)]
WAITING = [f"new{number}" for number in range(40)]


@pytest.fixture
def url(cluster: ValkeyCluster) -> str:
    """A cluster with 60 answers, of which 12 are dead letters, 40 messages that wait, and a worker."""
    url = cluster.url(shards=SHARDS)
    with Client(url) as client, AnsweringShards(url):
        images = [f"s3://b/{'broken' if number % 5 == 0 else number}.jpg" for number in range(60)]
        items = [{"id": job_id, "image": image} for job_id, image in zip(ANSWERED, images, strict=True)]
        list(client.enqueue_many(items))
        client.wait_many(ANSWERED, timeout_s=30)
    with Client(url) as client:
        list(client.enqueue_many([{"id": job_id, "image": "s3://b/k.jpg"} for job_id in WAITING]))
    for shard in open_shards(url, PoolOptions(timeout_s=5)):
        with shard:
            now_ms = float(shard.time()[0]) * 1000
            shard.zadd(WORKERS, {"w1": now_ms + 60_000})
            if shard.shard.index == 0:
                write_worker_state(shard, "w1", top_states.GPU_WORKER)
    return url


@pytest.fixture
def reader(url: str) -> Iterator[ShardsReader]:
    """A reader that gives up soon."""
    with ExitStack() as stack:
        clients = open_shards(url, PoolOptions(timeout_s=0.5))
        for client in clients:
            stack.enter_context(client)
        yield stack.enter_context(ShardsReader(clients))


def top(url: str, *args: str) -> str:
    """Standard output of `shiwu top --once`."""
    done = CliRunner().invoke(main, ["--redis-url", url, "top", "--once", *args])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_top_shows_sums_and_a_row_for_each_shard(url: str) -> None:
    """As JSON and as tables."""
    look: dict[str, Any] = json.loads(top(url, "--json"))
    assert (look["answered"], look["dead"], look["dead_read"], look["sample"]) == (60, 12, 12, 48)
    assert {each["lane"]: each["waiting"] for each in look["lanes"]} == {Lane.BULK: 40, Lane.INTERACTIVE: 0}
    assert [(each["code"], each["count"]) for each in look["failures"]] == [("source_not_found", 12)]
    assert [each["state"]["max_batch"] for each in look["workers"] if each["name"] == "w1"] == [128]
    wanted = by_shard(WAITING, shards=SHARDS, id_of=str)
    assert [each["bulk"] for each in look["shards"]] == [len(wanted.get(index, ())) for index in range(SHARDS)]
    assert sum(each["dead"] for each in look["shards"]) == 12
    assert all(each["node"].startswith("127.0.0.1:") for each in look["shards"])
    shown = top(url)
    assert "shard  interactive  bulk" in shown
    assert len([line for line in shown.splitlines() if "127.0.0.1:" in line]) == SHARDS


def test_hanging_node_is_told_beside_the_others(cluster: ValkeyCluster, url: str, reader: ShardsReader) -> None:
    """Its figures stay those of the last look; those of the others are new. Letters are those of all shards."""
    assert reader.look().problem is None
    assert len(reader.letters("source_not_found")) == 12
    hanging = cluster.owner(reader._clients[0].shard.slot or 0)
    away = {n for n in range(SHARDS) if cluster.owner(reader._clients[n].shard.slot or 0) == hanging}
    others = [f"more{n}" for n in range(200)]
    groups = by_shard(others, shards=SHARDS, id_of=str)
    added = [job_id for shard, group in groups.items() if shard not in away for job_id in group]
    cluster.server(hanging).pause()
    try:
        with Client(url, timeout_s=1.0) as client:
            list(client.enqueue_many([{"id": each, "image": "s3://b/k.jpg"} for each in added]))
        for each in reader._readers:
            each._snapshot = None
        look = reader.look()
        assert (look.problem or "").startswith(f"{len(away)} of {SHARDS} shards, shard {min(away)}: ")
        assert {shard.index for shard in look.shards if shard.problem} == away
        assert sum(lane.waiting for lane in look.lanes) == 40 + len(added)
    finally:
        cluster.server(hanging).resume()
    wait_until(lambda: reader.look().problem is None, timeout_s=20)


def test_key_6_shows_the_shards_alone(reader: ShardsReader) -> None:
    """And again all parts."""

    async def steps(pilot: Pilot[None]) -> None:
        await wait_screen(pilot, "source_not_found", "dead letters 12")
        await pilot.press("6")
        shown = await wait_screen(pilot, "6 shard")
        assert "4 code" not in shown
        assert len([line for line in shown.splitlines() if line[:1].isdigit()]) == SHARDS + 1
        await pilot.press("6")
        await wait_screen(pilot, "4 code")

    run_screen(TopApp(reader, None, where="cluster", every_s=0.5), steps)
