"""Shards on a real Valkey Cluster: scripts, transactions, channels, tracking, moves of slots, failovers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from shiwu.broker.redis_errors import NotACluster, RedisCode, WrongShardCount, classify
from shiwu.broker.sharding import PoolOptions, ShardRedis, keep_shard_count, open_shards
from shiwu.celery import options
from shiwu.contract import RETENTION, Lane
from shiwu_worker.stages.claim.notifier import LaneNotifier
from tests.support.both_clients import OpenClient
from tests.support.celery_client import celery_client
from tests.support.certificates import Certificate
from tests.support.processes import LOOPBACK, free_ports
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.tls_front import TlsFront
from tests.support.valkey_cluster import SLOTS, ValkeyCluster
from tests.support.waiting import wait_until

T = TypeVar("T")
ADD = "return redis.call('RPUSH', KEYS[1], ARGV[1]) + redis.call('INCR', KEYS[2])"


@pytest.fixture
def shards(cluster: ValkeyCluster) -> Iterator[tuple[ShardRedis, ...]]:
    """Clients of sixteen shards."""
    with opened(cluster.url()) as clients:
        yield clients


@contextmanager
def opened(url: str, *, timeout_s: float = 5, **options: Any) -> Iterator[tuple[ShardRedis, ...]]:
    """Clients that are closed afterwards."""
    with ExitStack() as stack:
        clients = open_shards(url, PoolOptions(timeout_s=timeout_s, **options))
        for client in clients:
            stack.enter_context(client)
        yield clients


def slot_of(client: ShardRedis) -> int:
    """The slot of a shard of a cluster."""
    assert client.shard.slot is not None
    return client.shard.slot


def until_done(call: Callable[[], T], *, timeout_s: float = 30) -> tuple[T, list[redis.RedisError]]:
    """Repeat a call as a worker does, while Redis is away; its result, and the errors before it."""
    errors: list[redis.RedisError] = []

    def tried() -> list[T]:
        try:
            return [call()]
        except redis.RedisError as error:
            if classify(error) not in {RedisCode.UNAVAILABLE, RedisCode.LOADING}:
                raise
            errors.append(error)
            return []

    return wait_until(tried, timeout_s=timeout_s, every_s=0.05)[0], errors


def test_keys_of_a_shard_are_on_the_node_of_its_slot(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """All shards work at once, each on one node."""
    for client in shards:
        client.set("shiwu:x", client.shard.index)
    for port in cluster.primaries():
        mine = {f"{client.shard.prefix}shiwu:x".encode() for client in shards if cluster.owner(slot_of(client)) == port}
        assert set(cluster.ask(port, "KEYS", "*")) == mine
    assert [int(client.get("shiwu:x")) for client in shards] == list(range(16))


def test_scripts_and_transactions_work_in_a_shard(shards: tuple[ShardRedis, ...]) -> None:
    """Several keys in one step, also where the node does not know the script."""
    for client in shards[:3]:
        script = client.register_script(ADD)
        assert script(keys=["list", "count"], args=["x"]) == 2
        with client.pipeline() as pipe:
            pipe.rpush("list", "y").incr("count").mget("count", "none")
            script(keys=["list", "count"], args=["z"], client=pipe)
            assert pipe.execute() == [2, 2, [b"2", None], 6]
        assert sorted(client.scan_iter()) == [b"count", b"list"]


def test_channels_of_a_shard_follow_its_slot(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """After a move the subscription is lost with an error, and made again on the new node."""
    client = shards[3]
    with closing(client.pubsub(ignore_subscribe_messages=True)) as listening:
        listening.ssubscribe("ended")
        assert listening.get_message(timeout=5) is None
        client.execute_command("SPUBLISH", "ended", "before")
        assert listening.get_message(timeout=5)["data"] == b"before"
        cluster.move_atomically(slot_of(client), to=cluster.other_than(cluster.owner(slot_of(client))))
        with pytest.raises(redis.ConnectionError):
            listening.get_message(timeout=5)

        def published() -> bool:
            until_done(lambda: client.execute_command("SPUBLISH", "ended", "after"))
            return until_done(lambda: listening.get_message(timeout=0.1))[0] is not None

        assert wait_until(published, timeout_s=10)


def test_lane_notifier_waits_for_the_lanes_of_a_shard(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """A message wakes it, also after its slot has moved."""
    with opened(cluster.url(), has_pushes=True) as (first, *_):
        notifier = LaneNotifier(first)
        for _ in range(2):
            assert not notifier.wait(0.05)
            pusher = threading.Timer(0.3, lambda: until_done(lambda: shards[0].rpush(Lane.BULK.keys[0], "x")))
            pusher.start()
            assert wait_until(lambda: notifier.wait(5), timeout_s=10)
            pusher.join()
            shards[0].delete(Lane.BULK.keys[0])
            cluster.move_atomically(slot_of(first), to=cluster.other_than(cluster.owner(slot_of(first))))
            until_done(lambda: shards[0].exists("x"))
        notifier.close()


class Traffic:
    """A thread that appends numbers with a script, and repeats each after an error until it is confirmed."""

    def __init__(self, client: ShardRedis) -> None:
        self._script = client.register_script(ADD)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.confirmed = 0
        self.errors: list[redis.RedisError] = []
        self.failure: BaseException | None = None

    def _run(self) -> None:
        try:
            while not self._is_stopped.is_set():
                _, errors = until_done(lambda: self._script(keys=["list", "count"], args=[self.confirmed]))
                self.errors += errors
                self.confirmed += 1
        except BaseException as error:  # whatever it is, the test's own thread fails by it
            self.failure = error
            raise

    def wait_for_more(self, more: int = 20) -> None:
        """Wait until more numbers are confirmed."""
        wanted = self.confirmed + more
        wait_until(lambda: self.confirmed >= wanted or self.failure, timeout_s=30)
        assert self.failure is None

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        self._thread.join(timeout=40)


def numbers_of(client: ShardRedis) -> list[int]:
    """What has been appended."""
    return [int(each) for each in client.lrange("list", 0, -1)]


def test_atomic_moves_of_a_slot_lose_nothing(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """Each number is there once: a command that the old node refused has not run."""
    client = shards[5]
    with Traffic(client) as traffic:
        traffic.wait_for_more()
        for _ in range(3):
            cluster.move_atomically(slot_of(client), to=cluster.other_than(cluster.owner(slot_of(client))))
            traffic.wait_for_more()
    assert numbers_of(client) == list(range(traffic.confirmed))
    assert int(client.get("count")) == traffic.confirmed
    assert 1 <= len(traffic.errors) <= 30


def test_slot_moved_key_by_key_is_away_meanwhile(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """A script whose keys are on two nodes is refused before it runs, and works after the move."""
    client = shards[6]
    slot = slot_of(client)
    target = cluster.other_than(cluster.owner(slot))
    with Traffic(client) as traffic:
        traffic.wait_for_more()
        source = cluster.begin_move(slot, to=target)
        assert cluster.move_keys(slot, source=source, to=target, most=1) == 1
        with pytest.raises(redis.ConnectionError, match=r"AskError|TryAgainError"):
            client.register_script(ADD)(keys=["list", "count"], args=["half"])
        cluster.end_move(slot, source=source, to=target)
        traffic.wait_for_more()
    assert numbers_of(client) == list(range(traffic.confirmed))
    assert int(client.get("count")) == traffic.confirmed


def test_other_shards_go_on_during_a_failover(tmp_path: Path) -> None:
    """A killed primary's shards come back with its replica; those of other nodes never notice."""
    with ValkeyCluster(folder=tmp_path, replicas=3) as cluster, opened(cluster.url(), client_name="test") as shards:
        for client in shards:
            client.set("x", 1)
            client.wait(1, 5000)
        killed = cluster.owner(slot_of(shards[0]))
        hit = [client for client in shards if cluster.owner(slot_of(client)) == killed]
        cluster.server(killed).kill()
        for client in shards:
            if client not in hit:
                assert client.incr("x") == 2
        results = [until_done(partial(client.incr, "x"), timeout_s=60) for client in hit]
        assert [count for count, _ in results] == [2] * len(hit)
        assert results[0][1]
        # The old primary comes back as a replica, and no client goes to it.
        cluster.server(killed).start()
        wait_until(lambda: cluster.ask(killed, "ROLE")[0] == b"slave", timeout_s=30)
        assert [client.incr("x") for client in hit] == [3] * len(hit)


def test_node_that_has_left_the_cluster_is_passed_over(
    cluster: ValkeyCluster, open_client: OpenClient, tmp_path: Path
) -> None:
    """It is named by the URL and still runs; either client asks the next node then."""
    lonely = RedisServer(folder=tmp_path, binary=valkey_binary(), config={"cluster-enabled": "yes"})
    lonely.config["cluster-port"] = str(free_ports(1)[0])
    try:
        url = f"cluster://{LOOPBACK}:{lonely.start().port},{cluster.seeds}/?shards=16"
        with opened(url) as shards:
            assert until_done(shards[5].ping)[0]
        with open_client(url) as client:
            assert until_done(client.queue_state)[0].dead == 0
    finally:
        lonely.stop()


def test_hung_node_delays_its_own_shards_only(tmp_path: Path) -> None:
    """Its connections time out, and then go to the replica; a hung seed does not stop the others from opening."""
    with ValkeyCluster(folder=tmp_path, replicas=1) as cluster:
        first = cluster.ports[0]
        cluster.server(first).pause()
        with opened(cluster.url(), timeout_s=1.5) as shards:
            # At the start the first third of the slots is on the first node.
            hit, others = (
                [client for client in shards if (slot_of(client) < SLOTS // 3) == is_hit] for is_hit in (True, False)
            )
            for client in others:
                assert client.set("x", 1)
            assert until_done(lambda: hit[0].set("x", 1), timeout_s=60)[0]


def test_number_of_shards_is_kept(cluster: ValkeyCluster, shards: tuple[ShardRedis, ...]) -> None:
    """The first use stores it in shard 0, and another number is refused with both numbers."""
    keep_shard_count(shards[0], shards=16)
    keep_shard_count(shards[0], shards=16)
    assert shards[0].hgetall(RETENTION) == {b"shards": b"16"}
    with opened(cluster.url(shards=8)) as other:
        with pytest.raises(WrongShardCount, match=r"expected 16 shards.*got shards=8") as caught:
            keep_shard_count(other[0], shards=8)
        assert classify(caught.value) is RedisCode.SHARDS


def test_one_server_is_one_shard_without_prefix(redis_url: str, redis_client: redis.Redis) -> None:
    """The same function opens any URL."""
    with opened(redis_url) as clients:
        assert [client.shard.prefix for client in clients] == [""]
        clients[0].set("x", 1)
        assert redis_client.keys() == [b"x"]


def test_unusable_cluster_is_an_error_of_its_own(tmp_path: Path, redis_url: str) -> None:
    """No node, a server without cluster mode, and a cluster in which no node has the slot."""
    with opened("cluster://127.0.0.1:1,127.0.0.1:2/?shards=1") as clients:
        with pytest.raises(redis.ConnectionError) as caught:
            clients[0].ping()
        assert classify(caught.value) is RedisCode.UNAVAILABLE
    with (
        opened(redis_url.replace("redis://", "cluster://") + "?shards=1") as clients,
        pytest.raises(NotACluster, match="standalone mode"),
    ):
        clients[0].ping()
    config = {"cluster-enabled": "yes"}
    with (
        RedisServer(folder=tmp_path, binary=valkey_binary(), config=config) as server,
        opened(server.url.replace("redis://", "cluster://") + "?shards=1") as clients,
        pytest.raises(redis.ConnectionError, match="expected a primary for slot"),
    ):
        clients[0].ping()


def test_login_and_name_are_used_on_every_node(tmp_path: Path) -> None:
    """The password of the URL is right for the map and for the shards; a wrong one is an error of the login."""
    with ValkeyCluster(folder=tmp_path, primaries=1) as cluster:
        port = cluster.ports[0]
        cluster.ask(port, "ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all")
        cluster.ask(port, "ACL", "SETUSER", "default", "resetpass", "nocommands", "+ping")
        with opened(cluster.url(shards=1).replace("://", "://me:secret@"), client_name="mine") as clients:
            assert clients[0].client_getname() == "mine"
            clients[0].acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])
        with opened(cluster.url(shards=1).replace("://", "://me:wrong@")) as clients:
            with pytest.raises(redis.AuthenticationError) as caught:
                clients[0].ping()
            assert "wrong@" not in str(caught.value)


def test_cluster_that_is_down_is_away(tmp_path: Path) -> None:
    """With full coverage required, one slot without a node stops all; it comes back by itself."""
    config = {"cluster-require-full-coverage": "yes"}
    with ValkeyCluster(folder=tmp_path, primaries=1, config=config) as cluster:
        [port] = cluster.ports
        with opened(cluster.url(shards=1)) as clients:
            clients[0].set("x", 1)
            cluster.ask(port, "CLUSTER", "DELSLOTS", 16_383)
            wait_until(lambda: b"cluster_state:fail" in cluster.ask(port, "CLUSTER", "INFO"), timeout_s=10)
            with pytest.raises(redis.ConnectionError, match="ClusterDownError") as caught:
                clients[0].get("x")
            assert classify(caught.value) is RedisCode.UNAVAILABLE
            cluster.ask(port, "CLUSTER", "ADDSLOTS", 16_383)
            assert until_done(lambda: clients[0].get("x"))[0] == b"1"


def test_node_that_loads_its_data_is_waited_for(tmp_path: Path) -> None:
    """Its shards answer when it has read them."""
    with ValkeyCluster(folder=tmp_path, primaries=1) as cluster:
        [port] = cluster.ports
        server = cluster.server(port)
        with opened(cluster.url(shards=1)) as clients:
            clients[0].set("x", 1)
            for number in range(3000):
                clients[0].set(f"key-{number}", "x")
            cluster.ask(port, "SAVE")
            server.stop()
            server.config |= {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024"}
            server.start(is_loading_enough=True)
            value, errors = until_done(lambda: clients[0].get("x"))
            assert value == b"1"
            assert errors


def test_cluster_over_tls_checks_the_name_of_each_node(tmp_path: Path) -> None:
    """Nodes that announce a name are verified by it; without the right authority nothing is sent."""
    config = {"cluster-preferred-endpoint-type": "hostname", "cluster-announce-hostname": "localhost"}
    certificate = Certificate.make(tmp_path, name="localhost")
    with (
        ValkeyCluster(folder=tmp_path, primaries=1, config=config) as cluster,
        TlsFront(cluster.ports[0], certificate.server_context()) as front,
    ):
        cluster.ask(cluster.ports[0], "CONFIG", "SET", "cluster-announce-port", front.port)
        url = f"clusters://127.0.0.1:{front.port},localhost:{front.port}/?shards=1"
        with opened(f"{url}&ssl_ca_certs={certificate.path}") as clients:
            assert clients[0].set("x", 1)
        with celery_client(config=options(f"{url}&ssl_ca_certs={certificate.path}")) as app:
            assert app.backend.get("x") == b"1"
            app.send_task("shiwu.tag", queue="shiwu.bulk")
        assert cluster.ask(cluster.ports[0], "LLEN", "{0ai}:shiwu.bulk") == 1
        with opened(url) as clients:
            with pytest.raises(redis.ConnectionError) as caught:
                clients[0].ping()
            assert classify(caught.value) is RedisCode.TLS
