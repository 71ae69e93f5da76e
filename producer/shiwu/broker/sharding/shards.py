"""Shards: which part of the jobs an id belongs to, and the hash tag that keeps all keys of a shard in one slot."""

from __future__ import annotations

import zlib
from binascii import crc_hqx
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import count, product
from string import ascii_lowercase
from typing import Final, TypeVar

from shiwu.broker.redis_url import MAX_SHARDS

T = TypeVar("T")
SLOTS: Final = 16_384
"""Slots of a Redis or Valkey Cluster."""
_WINDOW: Final = SLOTS // MAX_SHARDS


@dataclass(frozen=True, slots=True)
class Shard:
    """One of N parts of the jobs. All of its keys begin with `prefix`, so they are in one slot, on one node."""

    index: int = 0
    tag: str = ""
    """The text in braces that a cluster hashes instead of the whole key; empty without a cluster."""
    slot: int | None = None
    """The slot of the tag; None without a cluster."""

    @property
    def prefix(self) -> str:
        """What every key and channel of this shard begins with; empty without a cluster."""
        return f"{{{self.tag}}}:" if self.tag else ""


ONE_SERVER: Final = Shard()
"""All jobs of one server without cluster mode."""


def shard_of(job_id: str, *, shards: int) -> int:
    """The index of the shard that a job belongs to. It stays the same forever, as does the number of shards."""
    return zlib.crc32(job_id.encode()) % shards


def by_shard(items: Iterable[T], *, shards: int, id_of: Callable[[T], str]) -> dict[int, list[T]]:
    """Index of a shard → the items whose ids belong to it, in their order; only shards with items."""
    groups: dict[int, list[T]] = {}
    for item in items:
        groups.setdefault(shard_of(id_of(item), shards=shards) if shards > 1 else 0, []).append(item)
    return groups


def slot_of(tag: str) -> int:
    """The slot of all keys with this hash tag: CRC-16/XMODEM modulo the number of slots."""
    return crc_hqx(tag.encode(), 0) % SLOTS


def shard_with_prefix(prefix: str) -> Shard:
    """The shard whose keys have this prefix, a hash tag in braces and a colon. Its index is not known and stays 0.

    Raises:
        ValueError: it is no such prefix.
    """
    tag = prefix[1:-2]
    if not tag or prefix != f"{{{tag}}}:" or {"{", "}"} & set(tag):
        raise ValueError(f"expected the prefix of a shard, such as {{0ai}}:, got {prefix!r:.40}")
    return Shard(tag=tag, slot=slot_of(tag))


@cache
def cluster_shard(index: int) -> Shard:
    """The shard with this index. Its tag is the index and the shortest, then first, letters that fall into its window.

    Window number `index` with its eight bits reversed, so that the first N shards are spread over all slots for any N.

    Raises:
        ValueError: the index is not below 256.
    """
    if not 0 <= index < MAX_SHARDS:
        raise ValueError(f"expected the index of a shard from 0 to {MAX_SHARDS - 1}, got {index}")
    window = int(f"{index:08b}"[::-1], 2)
    for length in count(1):
        for letters in product(ascii_lowercase, repeat=length):
            tag = f"{index}{''.join(letters)}"
            if slot_of(tag) // _WINDOW == window:
                return Shard(index=index, tag=tag, slot=slot_of(tag))
    raise AssertionError("unreachable: the loop has no end")
