"""Takes the prefix of a shard from the keys in a reply, so that it is the reply of a server without shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Final

_PUSHES: Final = frozenset(
    {
        *(b"message", b"smessage", b"subscribe", b"unsubscribe", b"ssubscribe", b"sunsubscribe"),
        *(b"pmessage", b"psubscribe", b"punsubscribe"),
    }
)


class KeyReader:
    """Reads the replies to the commands of one shard."""

    def __init__(self, prefix: str) -> None:
        self._text = prefix
        self._bytes = prefix.encode()

    def key(self, name: Any) -> Any:
        """A key without the prefix; anything else as it is."""
        if isinstance(name, bytes):
            return name.removeprefix(self._bytes)
        return name.removeprefix(self._text) if isinstance(name, str) else name

    def keys(self, names: Any) -> Any:
        """A list of keys."""
        return [self.key(name) for name in names] if isinstance(names, list | tuple | set) else names

    def first(self, reply: Any) -> Any:
        """A key and what was found in it, or None."""
        return [self.key(reply[0]), *reply[1:]] if isinstance(reply, list | tuple) and reply else reply

    def every_other(self, reply: Any) -> Any:
        """Keys and values in turn, or a mapping with RESP3."""
        if isinstance(reply, Mapping):
            return {self.key(name): value for name, value in reply.items()}
        return [self.key(each) if position % 2 == 0 else each for position, each in enumerate(reply or [])]

    def streams(self, reply: Any) -> Any:
        """Streams and their entries: pairs, or a mapping with RESP3."""
        if isinstance(reply, Mapping):
            return {self.key(name): entries for name, entries in reply.items()}
        return [[self.key(name), *entries] for name, *entries in reply] if reply else reply

    def scan(self, reply: Any) -> Any:
        """A cursor and keys."""
        return [reply[0], self.keys(reply[1])]

    def push(self, reply: Any) -> Any:
        """A message of a channel, or a notification of changed keys."""
        if not isinstance(reply, list | tuple) or len(reply) < 2:
            return reply
        kind = reply[0].encode() if isinstance(reply[0], str) else reply[0]
        if kind == b"invalidate":
            return [reply[0], self.keys(reply[1])]
        if kind not in _PUSHES:
            return reply
        names = 2 if kind == b"pmessage" else 1
        return [reply[0], *map(self.key, reply[1 : 1 + names]), *reply[1 + names :]]


_READERS: Final[Mapping[str, Callable[[KeyReader, Any], Any]]] = MappingProxyType(
    {
        **dict.fromkeys(("BLPOP", "BRPOP", "BZPOPMAX", "BZPOPMIN"), KeyReader.first),
        **dict.fromkeys(("LMPOP", "BLMPOP", "ZMPOP", "BZMPOP"), KeyReader.first),
        **dict.fromkeys(("KEYS", "PUBSUB CHANNELS", "PUBSUB SHARDCHANNELS"), KeyReader.keys),
        **dict.fromkeys(("PUBSUB NUMSUB", "PUBSUB SHARDNUMSUB"), KeyReader.every_other),
        "SCAN": KeyReader.scan,
        **dict.fromkeys(("XREAD", "XREADGROUP"), KeyReader.streams),
    }
)


def take_prefix_from_replies(callbacks: MutableMapping[Any, Any], reader: KeyReader) -> None:
    """Change redis-py's functions that read the replies of commands, so that they get keys without the prefix."""
    for name, read in _READERS.items():
        callbacks[name] = _then(read, reader, callbacks.get(name))


def _then(read: Callable[[KeyReader, Any], Any], reader: KeyReader, following: Any) -> Callable[..., Any]:
    def run(reply: Any, **options: Any) -> Any:
        found = read(reader, reply)
        return found if following is None else following(found, **options)

    return run
