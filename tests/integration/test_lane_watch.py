"""The lane watch on a real cluster: one connection for each node, and news of every shard."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import redis

from shiwu.broker.redis_url import read_redis_url
from shiwu.broker.sharding import PoolOptions, ShardRedis, open_nodes, open_shards
from shiwu.contract import Lane
from shiwu_worker.errors import FatalError
from shiwu_worker.stages.claim import lane_watch
from shiwu_worker.stages.claim.lane_watch import LaneWatch
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

SHARDS = 6
BULK = Lane.BULK.keys[0]
NAME = "watching"


class Dry:
    """A shard whose claims find nothing until its lanes are noted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self.noted = threading.Event()

    def dry_lanes(self) -> list[Lane]:
        """The lanes without messages."""
        with self._lock:
            return list(self._lanes)

    def note_messages_in(self, lanes: Collection[Lane]) -> None:
        """Note that there are some."""
        with self._lock:
            if lanes:
                self._lanes = [lane for lane in self._lanes if lane not in lanes]
                self.noted.set()

    def dry_up(self) -> None:
        """A claim found nothing."""
        with self._lock:
            self._lanes = list(Lane)
            self.noted.clear()


class Watching:
    """A lane watch over shards that have no messages."""

    def __init__(self, url: str) -> None:
        self.clients: tuple[ShardRedis, ...] = open_shards(url, PoolOptions(timeout_s=5))
        self.watched = set(range(SHARDS))
        self.dry = [Dry() for _ in range(SHARDS)]
        self.fatal: list[FatalError] = []
        self.watch = LaneWatch(
            [(client.shard, dry) for client, dry in zip(self.clients, self.dry, strict=True)],
            open_nodes(read_redis_url(url, may_be_cluster=True), PoolOptions(timeout_s=5, client_name=NAME)),
            lanes=Lane,
            is_watched=lambda shard: shard in self.watched,
            round_pause_s=lambda: 0.05,
            on_fatal=self.fatal.append,
        )

    def dry_up(self) -> None:
        """Let all lanes be empty and looked at."""
        for dry in self.dry:
            dry.dry_up()
        self.watch.wake()

    def push(self, shard: int) -> None:
        """Send a message, as often as it takes while a slot moves."""

        def is_sent() -> bool:
            try:
                self.clients[shard].rpush(BULK, "x")
            except redis.RedisError:
                return False
            return True

        wait_until(is_sent, timeout_s=30)

    def take(self, shard: int) -> None:
        """Wait until a message is seen, and take it as a claim does."""
        assert self.dry[shard].noted.wait(30), f"shard {shard}"
        self.clients[shard].delete(BULK)
        self.dry[shard].dry_up()
        self.watch.look_at(shard)


@contextmanager
def watching(cluster: ValkeyCluster) -> Iterator[Watching]:
    """A lane watch whose threads run."""
    made = Watching(cluster.url(shards=SHARDS))
    made.dry_up()
    made.watch.thread.start()
    try:
        yield made
    finally:
        made.watch.close()
        assert made.watch.thread.join(10)
        for client in made.clients:
            client.close()
        assert made.fatal == []


def connections(cluster: ValkeyCluster, port: int, *, is_tracking: bool) -> int:
    """How many connections of the watch a node has, with or without notifications."""
    lines = [line.split() for line in cluster.ask(port, "CLIENT", "LIST").decode().splitlines()]
    mine = [dict(word.split("=", 1) for word in line if "=" in word) for line in lines if f"name={NAME}" in line]
    return sum(("t" in each["flags"]) == is_tracking for each in mine)


def tracked_keys(cluster: ValkeyCluster) -> int:
    """How many keys the nodes would notify of."""
    return sum(cluster.ask(port, "INFO", "STATS")["tracking_total_keys"] for port in cluster.primaries())


def calls(cluster: ValkeyCluster, command: str) -> int:
    """How often the nodes have run a command."""
    stats = [cluster.ask(port, "INFO", "COMMANDSTATS") for port in cluster.primaries()]
    return sum(each.get(f"cmdstat_{command}", {}).get("calls", 0) for each in stats)


def test_one_connection_a_node_tells_of_all_its_shards(cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time; nothing is asked meanwhile. Messages that are there before the first look are seen, too."""
    monkeypatch.setattr(lane_watch, "SWEEP_S", 3600.0)
    with watching(cluster) as made:
        wait_until(lambda: tracked_keys(cluster) == 8 * SHARDS, timeout_s=30, what="all lanes are tracked")
        asked = calls(cluster, "exists")
        for shard in (*range(SHARDS), *reversed(range(SHARDS))):
            made.push(shard)
            made.take(shard)
            wait_until(lambda: tracked_keys(cluster) == 8 * SHARDS, timeout_s=30, what="all lanes are tracked")
        for port in cluster.primaries():
            assert connections(cluster, port, is_tracking=True) == 1
            assert connections(cluster, port, is_tracking=False) == 0
        # One look finds the message; its end is a change, too, and two changes may be seen by one look or by two.
        assert calls(cluster, "exists") - asked <= 3 * 2 * SHARDS
        assert calls(cluster, "evalsha") == 0


def test_watch_follows_a_slot_that_moves(cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a sweep; the shards of the other nodes are told of meanwhile."""
    monkeypatch.setattr(lane_watch, "SWEEP_S", 0.5)
    with watching(cluster) as made:
        slot = made.clients[2].shard.slot or 0
        for _ in range(2):
            made.push(2)
            made.take(2)
            cluster.move_atomically(slot, to=cluster.other_than(cluster.owner(slot)))
            for shard in (2, 3):
                made.push(shard)
                made.take(shard)


def test_shards_of_others_are_looked_at_in_rounds(cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without notifications, until this worker becomes their watcher."""
    monkeypatch.setattr(lane_watch, "SWEEP_S", 3600.0)
    with watching(cluster) as made:
        wait_until(lambda: tracked_keys(cluster) == 8 * SHARDS, timeout_s=30, what="the first look")
        made.watched.clear()
        made.watch.wake()
        for shard in range(SHARDS):
            made.push(shard)
            made.take(shard)
        assert all(connections(cluster, port, is_tracking=False) == 1 for port in cluster.primaries())
        made.watched.update(range(SHARDS))
        made.watch.wake()
        wait_until(lambda: tracked_keys(cluster) == 8 * SHARDS, timeout_s=30, what="all lanes are tracked")


def test_lost_connections_are_made_again(cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are asked for messages by a claim meanwhile."""
    monkeypatch.setattr(lane_watch, "SWEEP_S", 3600.0)
    with watching(cluster) as made:
        wait_until(lambda: tracked_keys(cluster) == 8 * SHARDS, timeout_s=30, what="all lanes are tracked")
        for port in cluster.primaries():
            cluster.ask(port, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for shard in range(SHARDS):
            assert made.dry[shard].noted.wait(30)
        made.dry_up()
        wait_until(lambda: tracked_keys(cluster) == 8 * SHARDS, timeout_s=30, what="all lanes are tracked")
        wait_until(partial(are_closed, made), timeout_s=30)
        made.push(4)
        made.take(4)


def are_closed(made: Watching) -> bool:
    """Whether the clients of the test have noticed that their connections were killed, too."""
    try:
        return all(client.ping() for client in made.clients)
    except redis.RedisError:
        return False
