"""How answers are announced: on the channel with the name of the result key.

On one server the channel is one of `PUBLISH`. In a shard of a cluster it is a channel of that shard (`SPUBLISH`), which
costs the other nodes nothing. The workers choose, in `commit.lua`. This module is the place to change with them, for
both clients; redis-py's object for subscriptions in a shard chooses by itself (`ShardPubSub`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shiwu.broker.chunks import chunks
from shiwu.contract import RESULT_PREFIX, result_key

CHUNK_SIZE: Final = 500
"""Channels of one command."""


@dataclass(frozen=True, slots=True)
class ChannelCommands:
    """The commands of channels, and the first field of what the server sends."""

    subscribe: str
    unsubscribe: str
    message: bytes
    unsubscribed: bytes


ON_ONE_SERVER: Final = ChannelCommands("SUBSCRIBE", "UNSUBSCRIBE", b"message", b"unsubscribe")
IN_SHARD: Final = ChannelCommands("SSUBSCRIBE", "SUNSUBSCRIBE", b"smessage", b"sunsubscribe")


def channels(ids: Iterable[str]) -> list[str]:
    """The channels on which the answers of these ids are announced."""
    return [result_key(job_id) for job_id in ids]


def subscribe(pubsub: Any, ids: Sequence[str]) -> None:
    """Subscribe redis-py's object for subscriptions to the answers of these ids."""
    for portion in chunks(ids, CHUNK_SIZE):
        pubsub.subscribe(*channels(portion))


def read_announcement(message: Mapping[str, Any]) -> tuple[str, bytes]:
    """The id and the value of the result key in a message of redis-py's subscription."""
    return id_of(message["channel"]), message["data"]


def id_of(channel: bytes) -> str:
    """The id whose answer this channel announces."""
    return channel.decode().removeprefix(RESULT_PREFIX)
