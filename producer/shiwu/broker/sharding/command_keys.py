"""Puts the prefix of a shard on the keys and channels of a command.

`COMMANDS` has a row for each command that shiwu uses, and for what its administration needs. A command without a row is
refused, because its keys could go to another slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import redis

Keys: TypeAlias = Callable[[Sequence[Any]], Iterable[int]]
"""Gets a command in words, its name first, and gives the positions of its keys or channels."""


class UnknownCommand(redis.DataError):
    """A client of a shard does not know which arguments of this command are keys. Nothing was sent."""


def _words(text: str) -> list[str]:
    return text.split()


def _none(_: Sequence[Any]) -> Iterable[int]:
    return ()


def _at(*positions: int) -> Keys:
    return lambda words: [position for position in positions if position < len(words)]


def _all(words: Sequence[Any]) -> Iterable[int]:
    return range(1, len(words))


def _from(first: int) -> Keys:
    return lambda words: range(first, len(words))


def _all_but_last(words: Sequence[Any]) -> Iterable[int]:
    return range(1, len(words) - 1)


def _pairs(words: Sequence[Any]) -> Iterable[int]:
    return range(1, len(words), 2)


def _counted(count_at: int, *others: int) -> Keys:
    """After the number of keys come the keys; `others` are before it."""

    def find(words: Sequence[Any]) -> Iterable[int]:
        count = int(words[count_at]) if count_at < len(words) else 0
        return [*others, *range(count_at + 1, min(len(words), count_at + 1 + count))]

    return find


def _streams(first: int) -> Keys:
    """After the word STREAMS come the keys, then as many ids. The word is not looked for before `first`."""

    def find(words: Sequence[Any]) -> Iterable[int]:
        for position in range(first, len(words)):
            if as_word(words[position]) == "STREAMS":
                start = position + 1
                return range(start, start + (len(words) - start) // 2)
        return ()

    return find


def _tracked(words: Sequence[Any]) -> Iterable[int]:
    """The texts after PREFIX of CLIENT TRACKING."""
    return [position + 1 for position in range(len(words) - 1) if as_word(words[position]) == "PREFIX"]


_FIRST: Final = _words("""
APPEND DECR DECRBY EXPIRE EXPIREAT EXPIRETIME GET GETDEL GETEX GETRANGE GETSET HDEL HEXISTS HGET HGETALL HINCRBY
HINCRBYFLOAT HKEYS HLEN HMGET HMSET HRANDFIELD HSCAN HSET HSETNX HSTRLEN HVALS INCR INCRBY INCRBYFLOAT LINDEX LINSERT
LLEN LPOP LPOS LPUSH LPUSHX LRANGE LREM LSET LTRIM PERSIST PEXPIRE PEXPIREAT PEXPIRETIME PSETEX PTTL PUBLISH RPOP RPUSH
RPUSHX SADD SCARD SET SETEX SETNX SETRANGE SISMEMBER SMEMBERS SMISMEMBER SPOP SPUBLISH SRANDMEMBER SREM SSCAN STRLEN TTL
TYPE XACK XADD XAUTOCLAIM XCLAIM XDEL XLEN XPENDING XRANGE XREVRANGE XSETID XTRIM ZADD ZCARD ZCOUNT ZINCRBY ZLEXCOUNT
ZMSCORE ZPOPMAX ZPOPMIN ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK
ZREMRANGEBYSCORE ZREVRANGE ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE DUMP RESTORE
""")
_ALL: Final = _words("""
DEL EXISTS MGET TOUCH UNLINK WATCH SDIFF SDIFFSTORE SINTER SINTERSTORE SUNION SUNIONSTORE PFCOUNT PFMERGE
SUBSCRIBE UNSUBSCRIBE PSUBSCRIBE PUNSUBSCRIBE SSUBSCRIBE SUNSUBSCRIBE
""")
_TWO: Final = _words("BLMOVE BRPOPLPUSH COPY LMOVE RENAME RENAMENX RPOPLPUSH SMOVE ZRANGESTORE")
_KEYLESS: Final = _words("""
ACL ASKING AUTH BGREWRITEAOF BGSAVE CLIENT CLUSTER COMMAND CONFIG DISCARD ECHO EXEC FUNCTION HELLO INFO LASTSAVE LATENCY
MODULE MULTI PING QUIT READONLY READWRITE RESET ROLE SAVE SCRIPT SELECT SLOWLOG TIME UNWATCH WAIT WAITAOF
""")

COMMANDS: Final[Mapping[str, Keys]] = MappingProxyType(
    {
        **dict.fromkeys(_FIRST, _at(1)),
        **dict.fromkeys(_ALL, _all),
        **dict.fromkeys(_TWO, _at(1, 2)),
        **dict.fromkeys(_KEYLESS, _none),
        **dict.fromkeys(("MSET", "MSETNX"), _pairs),
        **dict.fromkeys(("BLPOP", "BRPOP", "BZPOPMAX", "BZPOPMIN"), _all_but_last),
        **dict.fromkeys(("EVAL", "EVALSHA", "EVALSHA_RO", "EVAL_RO", "FCALL", "FCALL_RO"), _counted(2)),
        **dict.fromkeys(("LMPOP", "SINTERCARD", "ZDIFF", "ZINTER", "ZINTERCARD", "ZMPOP", "ZUNION"), _counted(1)),
        **dict.fromkeys(("BLMPOP", "BZMPOP"), _counted(2)),
        **dict.fromkeys(("ZDIFFSTORE", "ZINTERSTORE", "ZUNIONSTORE"), _counted(2, 1)),
        "CLIENT TRACKING": _tracked,
        "KEYS": _at(1),
        "MEMORY USAGE": _at(2),
        **dict.fromkeys(("OBJECT ENCODING", "OBJECT FREQ", "OBJECT IDLETIME", "OBJECT REFCOUNT"), _at(2)),
        **dict.fromkeys(("PUBSUB CHANNELS", "PUBSUB SHARDCHANNELS"), _at(2)),
        **dict.fromkeys(("PUBSUB NUMSUB", "PUBSUB SHARDNUMSUB"), _from(2)),
        "SCAN": _none,
        "XINFO CONSUMERS": _at(2),
        "XINFO GROUPS": _at(2),
        "XINFO STREAM": _at(2),
        **dict.fromkeys(
            (f"XGROUP {word}" for word in ("CREATE", "CREATECONSUMER", "DELCONSUMER", "DESTROY", "SETID")), _at(2)
        ),
        "XREAD": _streams(1),
        "XREADGROUP": _streams(4),
    }
)
"""Command, with its subcommand where that decides, → the positions of its keys."""
_WITH_SUBCOMMAND: Final = frozenset(name.partition(" ")[0] for name in COMMANDS if " " in name)


def with_prefix(prefix: str, command: Sequence[Any], *, is_partly_done: bool = False) -> tuple[Any, ...]:
    """The command with the prefix on each of its keys, channels and patterns of them.

    Args:
        command: as redis-py sends it: name and arguments, where the name may have several words.
        is_partly_done: whether the caller has put the prefix on some of them, which stay as they are.

    Raises:
        UnknownCommand: no row of `COMMANDS` says which arguments are keys.
    """
    name = command[0].decode() if isinstance(command[0], bytes) else str(command[0])
    words: list[Any] = [*name.split(), *command[1:]]
    head = words[0].upper()
    if head in _WITH_SUBCOMMAND:
        longer = f"{head} {as_word(words[1]) if len(words) > 1 else ''}"
        head = longer if longer in COMMANDS or head not in COMMANDS else head
    keys = COMMANDS.get(head)
    if keys is None:
        raise UnknownCommand(
            f"expected a command whose keys a shard knows, got {head[:40]!r}; add it to COMMANDS, or use a client "
            "without shards"
        )
    for position in keys(words):
        if not (is_partly_done and _has_prefix(prefix, words[position])):
            words[position] = with_prefixed_key(prefix, words[position])
    words += _limits(prefix, head, words)
    return tuple(words)


def with_prefixed_key(prefix: str, key: Any) -> str | bytes:
    """The name of a key, channel or pattern in Redis."""
    if isinstance(key, bytes | bytearray | memoryview):
        return prefix.encode() + bytes(key)
    return f"{prefix}{key}"


def _has_prefix(prefix: str, key: Any) -> bool:
    if isinstance(key, bytes | bytearray | memoryview):
        return bytes(key).startswith(prefix.encode())
    return str(key).startswith(prefix)


def as_word(argument: Any) -> str:
    """An argument in upper case, if it can be a word of a command; otherwise an empty text."""
    text = argument.decode(errors="replace") if isinstance(argument, bytes) else argument
    return text.upper() if isinstance(text, str) else ""


def _limits(prefix: str, head: str, words: list[Any]) -> Sequence[str]:
    """What a command needs that names no key and yet concerns those of all shards: SCAN, tracking without keys."""
    if head == "SCAN":
        for position in range(2, len(words) - 1, 2):
            if as_word(words[position]) == "MATCH":
                words[position + 1] = with_prefixed_key(prefix, words[position + 1])
                return ()
        return ("MATCH", f"{prefix}*")
    if head == "CLIENT TRACKING" and "BCAST" in map(as_word, words) and "PREFIX" not in map(as_word, words):
        return ("PREFIX", prefix)
    if head in {"PUBSUB CHANNELS", "PUBSUB SHARDCHANNELS"} and len(words) == 2:
        return (f"{prefix}*",)
    return ()
