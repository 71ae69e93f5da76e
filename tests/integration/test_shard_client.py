"""The client of a shard gives the replies of a plain client, and every key on the server has the prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from shiwu.broker.sharding import ShardRedis, UnknownCommand, cluster_shard
from shiwu.broker.sharding.shard_client import KeyPrefix
from tests.support.servers import Valkey

SHARD = cluster_shard(7)
NAMES = st.sampled_from(["a", "b", "c", b"a", b"b", SHARD.prefix, "shiwu.bulk"])
TEXTS = st.sampled_from(["x", "y", b"\xff", SHARD.prefix, "1"])
SCORES = st.integers(0, 5)
Operation = Callable[[Any], Any]
MOVE = "redis.call('SET', KEYS[2], redis.call('GET', KEYS[1]) or 'none') return {#KEYS, ARGV[1]}"


def on(method: str, *arguments: st.SearchStrategy[Any], **options: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    """One call of a method with drawn arguments."""
    return st.tuples(st.just(method), st.tuples(*arguments), st.just(options))


OPERATIONS = st.one_of(
    on("set", NAMES, TEXTS),
    on("get", NAMES),
    on("mset", st.dictionaries(st.sampled_from(["a", "b"]), TEXTS, min_size=1)),
    on("mget", st.lists(NAMES, min_size=1)),
    on("delete", NAMES, NAMES),
    on("exists", NAMES, NAMES),
    on("rename", NAMES, NAMES),
    on("type", NAMES),
    on("keys"),
    on("keys", st.sampled_from(["a*", "[ab]"])),
    on("scan"),
    on("scan", st.just(0), st.sampled_from(["a*", "*b*"])),
    on("lpush", NAMES, TEXTS, TEXTS),
    on("lrange", NAMES, st.just(0), st.just(-1)),
    on("lmove", NAMES, NAMES),
    on("blpop", st.lists(NAMES, min_size=1), timeout=0.001),
    on("lmpop", st.just(2), NAMES, NAMES, direction="LEFT"),
    on("blmpop", st.just(0.001), st.just(2), NAMES, NAMES, direction="LEFT"),
    on("hset", NAMES, TEXTS, TEXTS),
    on("hgetall", NAMES),
    on("hscan", NAMES),
    on("sadd", NAMES, TEXTS),
    on("sinterstore", NAMES, st.lists(NAMES, min_size=1)),
    on("zadd", NAMES, st.dictionaries(TEXTS, SCORES, min_size=1)),
    on("zrange", NAMES, st.just(0), st.just(-1), withscores=True),
    on("zunionstore", NAMES, st.lists(NAMES, min_size=1)),
    on("bzpopmin", st.lists(NAMES, min_size=1), timeout=0.001),
    on("xadd", NAMES, st.dictionaries(TEXTS, TEXTS, min_size=1), st.sampled_from(["1-1", "2-1", "3-1"])),
    on("xread", st.dictionaries(st.sampled_from(["a", "b", "c"]), st.just("0"), min_size=1)),
    on("xgroup_create", NAMES, st.just("g"), st.just("0"), mkstream=True),
    on(
        "xreadgroup",
        st.just("g"),
        st.just("me"),
        st.dictionaries(st.sampled_from(["a", "b"]), st.just(">"), min_size=1),
    ),
    on("xlen", NAMES),
    on("eval", st.just(MOVE), st.just(2), NAMES, NAMES, TEXTS),
    on("publish", NAMES, TEXTS),
    on("object", st.just("ENCODING"), NAMES),
    on("expire", NAMES, st.just(100)),
    on("ping"),
    on("wait", st.just(0), st.just(1)),
)


def outcome(call: Callable[[], Any]) -> Any:
    """A reply or an error."""
    try:
        return call()
    except redis.ResponseError as error:
        return error


@pytest.fixture(scope="module", params=[2, 3], ids=["RESP2", "RESP3"])
def both(request: pytest.FixtureRequest, valkey_session: Valkey) -> Iterator[tuple[redis.Redis, ShardRedis]]:
    """A plain client, and one of a shard with a database of its own."""
    url = valkey_session.url
    options = {"protocol": request.param, "socket_timeout": 10}
    with (
        redis.Redis.from_url(f"{url[:-1]}4", **options) as plain,
        ShardRedis.from_url(f"{url[:-1]}5", shard=SHARD, **options) as shard,
    ):
        yield plain, shard


@given(operations=st.lists(OPERATIONS, min_size=1, max_size=25), is_pipeline=st.booleans())
def test_replies_are_those_of_a_plain_client(
    both: tuple[redis.Redis, ShardRedis], operations: list[tuple[Any, ...]], is_pipeline: bool
) -> None:
    """The same calls one after the other, or in one transaction; SCAN gives its keys in any order."""
    replies = []
    for client in both:
        clear(client)
        if is_pipeline:
            with client.pipeline() as pipe:
                for method, arguments, options in operations:
                    getattr(pipe, method)(*arguments, **options)
                replies.append([described(reply) for reply in pipe.execute(raise_on_error=False)])
        else:
            replies.append([described(outcome(lambda: getattr(client, m)(*a, **o))) for m, a, o in operations])  # noqa: B023 called in the same round
    assert replies[0] == replies[1]
    assert all(key.startswith(SHARD.prefix.encode()) for key in all_keys(both[1]))


def clear(client: redis.Redis) -> None:
    """Delete all keys of a database: a client of a shard refuses to."""
    with plain_of(client) as near:
        near.flushdb()


def all_keys(client: redis.Redis) -> list[bytes]:
    """The keys as the server has them."""
    with plain_of(client) as near:
        return list(near.keys())


def plain_of(client: redis.Redis) -> redis.Redis:
    """A plain client of the same database."""
    given = client.connection_pool.connection_kwargs
    return redis.Redis(host=given["host"], port=given["port"], db=given["db"], socket_timeout=10)


def described(reply: Any) -> Any:
    """Keys of SCAN and KEYS have no order; an error of the server quotes a key as the server has it."""
    if isinstance(reply, redis.ResponseError):
        return type(reply), str(reply).replace(SHARD.prefix, "")
    if isinstance(reply, tuple) and len(reply) == 2 and isinstance(reply[1], list):
        return reply[0], sorted(reply[1], key=repr)
    if isinstance(reply, list) and all(isinstance(each, bytes) for each in reply):
        return sorted(reply)
    return reply


@pytest.fixture
def shard(redis_url: str) -> Iterator[ShardRedis]:
    """A client of one shard on one server."""
    with ShardRedis.from_url(redis_url, shard=SHARD, socket_timeout=10) as client:
        yield client


def test_subscriptions_have_channels_of_their_shard(shard: ShardRedis, redis_client: redis.Redis) -> None:
    """Messages name the channel as the caller did; those of other shards do not come."""
    for subscribe, publish in (("subscribe", "spublish"), ("psubscribe", "publish"), ("ssubscribe", "spublish")):
        with closing(shard.pubsub(ignore_subscribe_messages=True)) as listening:
            getattr(listening, subscribe)("ended")
            assert listening.get_message(timeout=5) is None
            redis_client.execute_command(publish, "ended", "not for this shard")
            assert shard.execute_command(publish.upper(), "ended", "x") == 1
            message = listening.get_message(timeout=5)
            assert message is not None
            assert (message["channel"], message["data"]) == (b"ended", b"x")


def test_scripts_and_locks_use_keys_of_the_shard(shard: ShardRedis, redis_client: redis.Redis) -> None:
    """EVALSHA after a lost script, in a pipeline too."""
    script = shard.register_script(MOVE)
    redis_client.script_flush()
    assert script(keys=["a", "b"], args=["x"]) == [2, b"x"]
    redis_client.script_flush()
    with shard.pipeline() as pipe:
        script(keys=["a", "c"], args=["y"], client=pipe)
        assert pipe.execute() == [[2, b"y"]]
    with shard.lock("lock", timeout=5):
        assert set(redis_client.keys()) == {f"{SHARD.prefix}{key}".encode() for key in ("b", "c", "lock")}
    assert not shard.exists("lock")


def test_watched_keys_are_those_of_the_shard(shard: ShardRedis, redis_client: redis.Redis) -> None:
    """A change of the same name in another shard does not end the transaction; a change in this one does."""
    with shard.pipeline() as pipe:
        pipe.watch("a")
        redis_client.set("a", "elsewhere")
        pipe.multi()
        assert pipe.set("a", "1").execute() == [True]
        pipe.watch("a")
        redis_client.set(f"{SHARD.prefix}a", "here")
        pipe.multi()
        with pytest.raises(redis.WatchError):
            pipe.set("a", "2").execute()


def test_commands_without_known_keys_are_not_sent(shard: ShardRedis, redis_client: redis.Redis) -> None:
    """The connection stays usable."""
    redis_client.set("other", "x")
    with pytest.raises(UnknownCommand, match="FLUSHALL"):
        shard.flushall()
    with pytest.raises(UnknownCommand, match="SORT"):
        shard.pipeline().get("a").sort("a").execute()
    assert redis_client.get("other") == b"x"
    assert shard.get("other") is None


def test_client_without_prefix_is_a_plain_client(redis_url: str, redis_client: redis.Redis) -> None:
    """Nothing is between it and redis-py's connection."""
    with ShardRedis.from_url(redis_url) as client:
        client.set("a", "x")
        assert not issubclass(client.connection_pool.connection_class, KeyPrefix)
        assert client.response_callbacks == redis_client.response_callbacks
        assert redis_client.keys() == [b"a"]


def test_notification_of_a_changed_key_has_no_prefix(redis_url: str, redis_client: redis.Redis) -> None:
    """Client-side caching names keys as the caller did."""
    with ShardRedis.from_url(redis_url, shard=SHARD, protocol=3, socket_timeout=5) as client:
        connection: Any = client.connection_pool.get_connection()
        connection._parser.set_invalidation_push_handler(lambda push: push)
        for command in (("CLIENT", "TRACKING", "ON"), ("GET", "a")):
            connection.send_command(*command)
            connection.read_response()
        redis_client.set(f"{SHARD.prefix}a", "x")
        assert connection.read_response(push_request=True) == [b"invalidate", [b"a"]]
        client.connection_pool.release(connection)
