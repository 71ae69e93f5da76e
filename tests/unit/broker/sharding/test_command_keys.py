"""The prefix of a shard on the keys of commands, and off the keys of replies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from shiwu.broker.sharding.command_keys import COMMANDS, UnknownCommand, with_prefix
from tests.support.servers import Valkey

P = "{0ai}:"
CASES: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = [
    (("GET", "a"), ("GET", f"{P}a")),
    (("get", b"a"), ("get", f"{P}a".encode())),
    ((b"SET", "a", b"a", "EX", 3), ("SET", f"{P}a", b"a", "EX", 3)),
    (("GET", 7), ("GET", f"{P}7")),
    (("GET", bytearray(b"a")), ("GET", f"{P}a".encode())),
    (("MSET", "a", "1", "b", "2"), ("MSET", f"{P}a", "1", f"{P}b", "2")),
    (("BLPOP", "a", "b", 3), ("BLPOP", f"{P}a", f"{P}b", 3)),
    (("BLMPOP", 1.5, 2, "a", "b", "LEFT"), ("BLMPOP", 1.5, 2, f"{P}a", f"{P}b", "LEFT")),
    (("EVALSHA", "sha", 2, "a", "b", "c"), ("EVALSHA", "sha", 2, f"{P}a", f"{P}b", "c")),
    (("EVAL", "return 1", "0", "c"), ("EVAL", "return 1", "0", "c")),
    (("ZUNIONSTORE", "t", 1, "a", "WEIGHTS", 2), ("ZUNIONSTORE", f"{P}t", 1, f"{P}a", "WEIGHTS", 2)),
    (
        ("XREAD", "COUNT", 2, b"streams", "a", "b", "0", "$"),
        ("XREAD", "COUNT", 2, b"streams", f"{P}a", f"{P}b", "0", "$"),
    ),
    (
        ("XREADGROUP", "GROUP", "streams", "streams", "STREAMS", "a", ">"),
        ("XREADGROUP", "GROUP", "streams", "streams", "STREAMS", f"{P}a", ">"),
    ),
    (("XGROUP CREATE", "a", "g", "$"), ("XGROUP", "CREATE", f"{P}a", "g", "$")),
    (("XGROUP", "destroy", "a", "g"), ("XGROUP", "destroy", f"{P}a", "g")),
    (("MEMORY USAGE", "a"), ("MEMORY", "USAGE", f"{P}a")),
    (("SCRIPT EXISTS", "a"), ("SCRIPT", "EXISTS", "a")),
    (("CLIENT", "SETNAME", "a"), ("CLIENT", "SETNAME", "a")),
    (("CLIENT", "TRACKING", "ON"), ("CLIENT", "TRACKING", "ON")),
    (("CLIENT TRACKING", "ON", "BCAST"), ("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", P)),
    (
        ("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", "a", "PREFIX", "b"),
        ("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", f"{P}a", "PREFIX", f"{P}b"),
    ),
    (("SCAN", 0), ("SCAN", 0, "MATCH", f"{P}*")),
    (("SCAN", "0", "COUNT", 5, "match", "a*"), ("SCAN", "0", "COUNT", 5, "match", f"{P}a*")),
    (("HSCAN", "a", 0, "MATCH", "a*"), ("HSCAN", f"{P}a", 0, "MATCH", "a*")),
    (("SPUBLISH", "a", "a"), ("SPUBLISH", f"{P}a", "a")),
    (("PUBSUB CHANNELS",), ("PUBSUB", "CHANNELS", f"{P}*")),
    (("PUBSUB", "NUMSUB", "a", "b"), ("PUBSUB", "NUMSUB", f"{P}a", f"{P}b")),
]


@pytest.mark.parametrize(("given", "sent"), CASES, ids=[" ".join(map(str, given)) for given, _ in CASES])
def test_prefix_is_put_on_keys_only(given: tuple[Any, ...], sent: tuple[Any, ...]) -> None:
    """Values, members and options stay as they are."""
    assert tuple(map(_text, with_prefix(P, given))) == tuple(map(_text, sent))


def _text(word: Any) -> Any:
    return word.decode() if isinstance(word, bytes) else word


@pytest.mark.parametrize("command", [("FLUSHALL",), ("RANDOMKEY",), ("SORT", "a"), ("XGROUP", "NEW", "a"), ("MEMORY",)])
def test_command_without_known_keys_is_refused(command: tuple[str, ...]) -> None:
    """It could act on another shard, or on all of them."""
    with pytest.raises(UnknownCommand, match="add it to COMMANDS"):
        with_prefix(P, command)


@pytest.mark.parametrize(
    "command", [("GET",), ("EVAL", "x"), ("EVAL", "x", 3, "a"), ("XREAD",), ("BLPOP",), ("MSET", "a")]
)
def test_incomplete_command_is_left_to_the_server(command: tuple[Any, ...]) -> None:
    """The server's error says what is missing."""
    assert len(with_prefix(P, command)) == len(command)


@pytest.fixture(scope="module")
def server_commands(valkey_session: Valkey) -> Iterator[dict[str, Any]]:
    """Command → its row in the server's COMMAND."""
    with valkey_session.client(protocol=2) as client:
        yield client.command()


def test_tables_agree_with_the_server(server_commands: dict[str, Any]) -> None:
    """For every command whose keys are in fixed places: the server's first and last key and the step between them."""
    compared = set()
    for name, keys in COMMANDS.items():
        row = server_commands.get(name.lower())
        if row is None or "movablekeys" in {_text(flag) for flag in row["flags"]} or name in _CHANNELS:
            continue
        compared.add(name)
        words = [name, *"abcdefgh"]
        first, last, step = row["first_key_pos"], row["last_key_pos"], row["step_count"]
        end = last if last >= 0 else len(words) + last
        assert list(keys(words)) == (list(range(first, end + 1, step)) if first else []), name
    assert len(compared) > 120


_CHANNELS = {
    *("PUBLISH", "SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE", "SSUBSCRIBE", "SPUBLISH"),
    "KEYS",
}
"""Their channels and patterns are not all keys to the server."""
MOVABLE: list[tuple[Any, ...]] = [
    ("BLMPOP", 0, 2, "k1", "k2", "LEFT"),
    ("BZMPOP", 0, 1, "k1", "MIN"),
    ("EVAL", "return 1", 2, "k1", "k2", "a"),
    ("EVALSHA_RO", "0" * 40, 1, "k1", "a"),
    ("FCALL", "f", 1, "k1", "a"),
    ("LMPOP", 2, "k1", "k2", "LEFT"),
    ("SINTERCARD", 1, "k1", "LIMIT", 3),
    ("XREAD", "COUNT", 1, "STREAMS", "k1", "k2", "0", "0"),
    ("XREADGROUP", "GROUP", "g", "c", "STREAMS", "k1", ">"),
    ("ZDIFF", 2, "k1", "k2"),
    ("ZINTERSTORE", "k1", 1, "k2"),
    ("ZMPOP", 1, "k1", "MIN"),
    ("OBJECT", "ENCODING", "k1"),
    ("MEMORY", "USAGE", "k1"),
    ("XINFO", "STREAM", "k1"),
    ("XGROUP", "CREATE", "k1", "g", "$"),
]


@pytest.mark.parametrize("command", MOVABLE, ids=[str(command[0]) for command in MOVABLE])
def test_counted_keys_agree_with_the_server(command: tuple[Any, ...], redis_client: redis.Redis) -> None:
    """The keys that COMMAND GETKEYS finds."""
    found = redis_client.execute_command("COMMAND GETKEYS", *with_prefix(P, command))
    wanted = [word for word in command if str(word).startswith("k")]
    assert [_text(key) for key in found] == [f"{P}{key}" for key in wanted]
