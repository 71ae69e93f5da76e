"""What each error of Redis means: whether a retry can help, what has to change, and what to do.

`REDIS_ERRORS` has one row for every `RedisCode`. Clients, workers and the command line decide by it, and part of
`docs/errors.md` is generated from it.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

import redis
from redis import exceptions
from redis.asyncio import sentinel as asyncio_sentinel
from redis.sentinel import MasterNotFoundError

from shiwu.errors import ShiwuError

LogLevel = Literal["info", "warning", "error"]


class RedisCode(StrEnum):
    """Stable codes for errors of Redis and of the connection to it."""

    UNAVAILABLE = "redis_away"
    LOADING = "redis_loading"
    BUSY = "redis_busy"
    READ_ONLY = "redis_read_only"
    FULL = "redis_full"
    NOT_SAVED = "redis_not_saved"
    NOT_REPLICATED = "redis_not_replicated"
    CONNECTIONS = "redis_connections"
    LOGIN = "redis_login"
    PERMISSION = "redis_permission"
    CLUSTER = "redis_cluster"
    NO_CLUSTER = "redis_no_cluster"
    SHARDS = "redis_shards"
    OLD_NAMES = "redis_old_names"
    SENTINEL = "redis_sentinel"
    DATABASE = "redis_database"
    TLS = "redis_tls"
    PROTOCOL = "redis_protocol"
    UNSUPPORTED = "redis_unsupported"
    WRONG_TYPE = "redis_wrong_type"
    UNKNOWN = "redis_error"


class RedisFault(StrEnum):
    """What has to change before a command can succeed."""

    SERVER = "server"  # the state of Redis or of the network
    SETTINGS = "settings"  # the URL, the login, or what the operator runs under that address
    DATA = "data"  # a key that another program has written
    SERVICE = "service"  # shiwu itself


@dataclass(frozen=True, slots=True)
class RedisErrorInfo:
    """The meaning of one code."""

    fault: RedisFault
    is_temporary: bool
    """Whether the same command may succeed later without a change of settings; then it is retried."""
    meaning: str
    remedy: str
    log_level: LogLevel = "error"
    is_about_command: bool = False
    """Whether only this command is refused and others may succeed; then the caller skips what it wanted to do."""

    @property
    def ends_start(self) -> bool:
        """Whether a process that gets this error at its start exits with code 64 instead of retrying."""
        return not self.is_temporary and self.fault is RedisFault.SETTINGS


class NotOneServer(ShiwuError, redis.RedisError):
    """The address belongs to a cluster node or a sentinel, not to one Redis server; change the Redis URL."""

    code = "not_one_server"

    def __init__(self, mode: str) -> None:
        super().__init__(f"expected one Redis or Valkey server, got a server in {mode} mode")
        self.mode = mode


class NotACluster(ShiwuError, redis.RedisError):
    """The address of `cluster://` is not a node of a cluster; change the Redis URL."""

    code = "not_a_cluster"

    def __init__(self, mode: str) -> None:
        super().__init__(f"expected a node of a Redis or Valkey Cluster, got a server in {mode or 'another'} mode")


class WrongShardCount(ShiwuError, redis.RedisError):
    """The cluster was first used with another number of shards; another number would look for jobs in other shards."""

    code = "wrong_shard_count"

    def __init__(self, *, expected: str, got: int) -> None:
        super().__init__(f"expected {expected} shards, with which this cluster was first used, got shards={got}")


class OldNames(ShiwuError, redis.RedisError):
    """The database holds jobs under names of an earlier version, where this version would not find them."""

    code = "old_names"

    def __init__(self, found: Sequence[str]) -> None:
        super().__init__(f"expected no jobs under names of an earlier version, found {', '.join(found)}")


class NotReplicated(redis.RedisError):
    """Fewer replicas than requested have confirmed a write in time.

    The write is on the primary; a failover now may lose it. The same write may be repeated: jobs and answers keep their
    ids.
    """


class ConnectionsBusy(ShiwuError, exceptions.MaxConnectionsError):
    """All connections of this client stayed in use for the time that one command may take.

    Nothing was sent. Raise `max_connections` of `Client`, or use fewer threads.
    """

    code = "connections_busy"


def _server(meaning: str, remedy: str) -> RedisErrorInfo:
    return RedisErrorInfo(RedisFault.SERVER, is_temporary=True, meaning=meaning, remedy=remedy)


def _settings(meaning: str, remedy: str, *, is_about_command: bool = False) -> RedisErrorInfo:
    return RedisErrorInfo(
        RedisFault.SETTINGS, is_temporary=False, meaning=meaning, remedy=remedy, is_about_command=is_about_command
    )


REDIS_ERRORS: Final[Mapping[RedisCode, RedisErrorInfo]] = MappingProxyType(
    {
        RedisCode.UNAVAILABLE: _server(
            "Redis did not answer, or the connection was lost.",
            "Check that Redis runs, the host and port in the Redis URL, and redis:// against rediss://.",
        ),
        RedisCode.LOADING: _server("Redis has just started and loads its data.", "Wait."),
        RedisCode.BUSY: _server("Redis runs a long script or function.", "Find the script, or wait until it ends."),
        RedisCode.READ_ONLY: _server(
            "The server is a replica, as after a failover, or its primary is gone.",
            "Wait for the failover; if it lasts, give the primary's address, or sentinel://.",
        ),
        RedisCode.FULL: _server(
            "Redis has reached maxmemory and refuses writes.",
            "Give it more memory; keep maxmemory-policy noeviction.",
        ),
        RedisCode.NOT_SAVED: _server(
            "Redis refuses writes because its last save to disk failed.", "Read the log of Redis; free its disk."
        ),
        RedisCode.NOT_REPLICATED: _server(
            "Fewer replicas are connected, or have confirmed a write, than requested.",
            "Check the replicas; the same write may be repeated.",
        ),
        RedisCode.CONNECTIONS: _server(
            "All connections that the client may open, or that Redis accepts, are in use.",
            "Raise max_connections of Client, or maxclients of Redis, or use fewer threads.",
        ),
        RedisCode.LOGIN: _settings(
            "Redis refuses the user name or the password, or requires them.",
            "Correct the login, or sentinel_password, in the Redis URL; write %40 for @, %2F for /, %3A for : in it.",
        ),
        RedisCode.PERMISSION: _settings(
            "The Redis user may not run a command, use a key or use a channel that shiwu needs.",
            "Give the user the rights of docs/redis-acl.conf; `ACL LOG` names what was refused.",
            is_about_command=True,
        ),
        RedisCode.CLUSTER: _settings(
            "The server is a node of a Redis Cluster, and shiwu's scripts need all keys on one server.",
            "Give the address of one Redis or Valkey without cluster mode, with replicas and sentinels if needed.",
        ),
        RedisCode.NO_CLUSTER: _settings(
            "The server does not run in cluster mode.", "Use redis:// or sentinel:// instead of cluster://."
        ),
        RedisCode.SHARDS: _settings(
            "The cluster was first used with another number of shards, which stays the same forever.",
            "Give that number in the Redis URL: cluster://host:port/?shards=NUMBER.",
        ),
        RedisCode.OLD_NAMES: _settings(
            "The database holds jobs under names that an earlier version gave to its keys.",
            "Stop all workers and sweeps of that version, run `shiwu migrate`, and start again.",
        ),
        RedisCode.SENTINEL: _settings(
            "The server is a sentinel, which holds no data.",
            "Use sentinel://host:26379,host:26379/master-name/0 instead of redis://.",
        ),
        RedisCode.DATABASE: _settings(
            "Redis has no database with this number.",
            "Use a smaller number in the Redis URL, or raise `databases` of Redis.",
        ),
        RedisCode.TLS: _settings(
            "The TLS handshake failed: a certificate is not trusted or not for this host, or one side has no TLS.",
            "Check rediss:// against redis://, the port, ssl_ca_certs and the host name in the certificate.",
        ),
        RedisCode.PROTOCOL: _settings(
            "The program at this address does not use the Redis protocol.",
            "Check the host and port in the Redis URL.",
        ),
        RedisCode.UNSUPPORTED: _settings(
            "The server does not know a command that shiwu needs.",
            "Use Redis 6.2 or newer, or Valkey, and rename or disable none of the commands in docs/redis-acl.conf.",
        ),
        RedisCode.WRONG_TYPE: RedisErrorInfo(
            RedisFault.DATA,
            is_temporary=False,
            meaning="A key of shiwu has a value of another type, which another program has written.",
            remedy="Wait until a worker or `shiwu sweep` moves it aside, and give each program its own user.",
            is_about_command=True,
        ),
        RedisCode.UNKNOWN: RedisErrorInfo(
            RedisFault.SERVICE,
            is_temporary=False,
            meaning="Redis answered with an error that shiwu does not know.",
            remedy="Report it with the message and the version of Redis.",
            is_about_command=True,
        ),
    }
)

_WORDS: Final[Mapping[str, RedisCode]] = {
    "NOAUTH": RedisCode.LOGIN,
    "WRONGPASS": RedisCode.LOGIN,
    "NOPERM": RedisCode.PERMISSION,
    "MOVED": RedisCode.CLUSTER,
    "ASK": RedisCode.CLUSTER,
    "CROSSSLOT": RedisCode.CLUSTER,
    "CLUSTERDOWN": RedisCode.CLUSTER,
    "TRYAGAIN": RedisCode.CLUSTER,
    "cluster support disabled": RedisCode.NO_CLUSTER,
    "LOADING": RedisCode.LOADING,
    "BUSY": RedisCode.BUSY,
    "READONLY": RedisCode.READ_ONLY,
    "MASTERDOWN": RedisCode.READ_ONLY,
    "OOM": RedisCode.FULL,
    "MISCONF": RedisCode.NOT_SAVED,
    "NOREPLICAS": RedisCode.NOT_REPLICATED,
    "WRONGTYPE": RedisCode.WRONG_TYPE,
    "DB index is out of range": RedisCode.DATABASE,
    "invalid DB index": RedisCode.DATABASE,
    "SELECT is not allowed in cluster mode": RedisCode.CLUSTER,
    "max number of clients reached": RedisCode.CONNECTIONS,
    "unknown command": RedisCode.UNSUPPORTED,
    "Transaction discarded": RedisCode.BUSY,
}
"""Word in the server's reply → code. Redis 6.2 puts its own words before it in the error of a script."""
_WORD: Final = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in _WORDS))
_TYPES: Final[tuple[tuple[type[Exception], RedisCode], ...]] = (
    (NotReplicated, RedisCode.NOT_REPLICATED),
    (NotACluster, RedisCode.NO_CLUSTER),
    (WrongShardCount, RedisCode.SHARDS),
    (OldNames, RedisCode.OLD_NAMES),
    (exceptions.MaxConnectionsError, RedisCode.CONNECTIONS),
    (exceptions.AuthenticationError, RedisCode.LOGIN),
    (exceptions.AuthorizationError, RedisCode.PERMISSION),
    (exceptions.NoPermissionError, RedisCode.PERMISSION),
    (exceptions.AuthenticationWrongNumberOfArgsError, RedisCode.LOGIN),
    (exceptions.MasterDownError, RedisCode.READ_ONLY),
    (exceptions.ClusterDownError, RedisCode.CLUSTER),
    (exceptions.ClusterCrossSlotError, RedisCode.CLUSTER),
    (exceptions.TryAgainError, RedisCode.CLUSTER),
    (exceptions.AskError, RedisCode.CLUSTER),
    (exceptions.BusyLoadingError, RedisCode.LOADING),
    (exceptions.ReadOnlyError, RedisCode.READ_ONLY),
    (exceptions.OutOfMemoryError, RedisCode.FULL),
    (exceptions.InvalidResponse, RedisCode.PROTOCOL),
)
"""redis-py removes the first word of the text where it has a type for it."""


_NO_MASTER: Final = (MasterNotFoundError, asyncio_sentinel.MasterNotFoundError)
"""redis-py's blocking and its asyncio client have a class of their own for sentinels that name no primary."""


def classify(error: BaseException) -> RedisCode:
    """The code of an error that redis-py or its socket has raised."""
    if isinstance(error, NotOneServer):
        return RedisCode.SENTINEL if error.mode == "sentinel" else RedisCode.CLUSTER
    if isinstance(error, _NO_MASTER) and "AuthenticationError" in str(error):
        return RedisCode.LOGIN  # at the sentinels
    for kind, code in _TYPES:
        if isinstance(error, kind):
            return code
    if isinstance(error, redis.ResponseError):
        # The text of an error in a pipeline begins with the command, whose words a producer may have chosen.
        found = _WORD.search(str(error).rpartition("caused error: ")[2])
        return _WORDS[found[0]] if found else RedisCode.UNKNOWN
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return _classify_connection(error)
    return RedisCode.UNKNOWN


def _classify_connection(error: BaseException) -> RedisCode:
    if "max number of clients reached" in str(error):
        return RedisCode.CONNECTIONS
    return RedisCode.TLS if any(map(_is_handshake, _causes(error))) else RedisCode.UNAVAILABLE


def info_of(error: BaseException) -> RedisErrorInfo:
    """The row of `REDIS_ERRORS` for this error."""
    return REDIS_ERRORS[classify(error)]


_OTHER_MARKERS: Final[Mapping[RedisCode, str]] = {
    RedisCode.UNAVAILABLE: "connection errors and time-outs",
    RedisCode.CLUSTER: "`cluster` in the greeting",
    RedisCode.SENTINEL: "`sentinel` in the greeting",
    RedisCode.TLS: "`SSLError` in the handshake",
    RedisCode.UNKNOWN: "any other reply",
}


def markers_of(code: RedisCode) -> list[str]:
    """What leads to a code, as Markdown: words in Redis' replies, and classes of redis-py."""
    words = [word for word, known in _WORDS.items() if known is code]
    words += [kind.__name__ for kind, known in _TYPES if known is code]
    return [f"`{word}`" for word in words] + ([_OTHER_MARKERS[code]] if code in _OTHER_MARKERS else [])


def explain(error: BaseException) -> str:
    """Text for the operator: the code, what it means, what to do, and the reply of Redis."""
    code = classify(error)
    info = REDIS_ERRORS[code]
    # After the colon come the sentinels with all their arguments.
    text = str(error).partition(" : ")[0] if isinstance(error, _NO_MASTER) else str(error)
    reply = " ".join(text.split()).rstrip(".")
    return f"{code}: {info.meaning} {info.remedy} (Redis said: {reply:.300})"


def _is_handshake(error: BaseException) -> bool:
    """Whether the TLS handshake failed; a connection that was lost during the handshake does not count."""
    broken = ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError | ssl.SSLWantReadError
    return isinstance(error, ssl.SSLError) and not isinstance(error, broken)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, up to ten."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__
