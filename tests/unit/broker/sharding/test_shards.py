"""Shards: their tags, slots and prefixes, and which shard an id belongs to."""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
from redis.crc import key_slot

from shiwu.broker.redis_url import MAX_SHARDS
from shiwu.broker.sharding import ONE_SERVER, cluster_shard, shard_of, shard_with_prefix

FIRST = "0ai 1cb 2de 3fn 4be 5oo 6gi 7eb 8ec 9gh 10bka 11gw 12o 13w 14fp 15kz".split()  # noqa: SIM905 as one reads them
SLOTS = 16_384


def test_tags_of_the_first_shards_stay_the_same() -> None:
    """Keys have them: another tag would lose all jobs of a shard."""
    assert [cluster_shard(index).tag for index in range(len(FIRST))] == FIRST
    assert zlib.crc32(" ".join(cluster_shard(index).tag for index in range(MAX_SHARDS)).encode()) == 135_360_301


def test_keys_of_a_shard_have_the_slot_of_its_tag() -> None:
    """As redis-py computes the slot of a whole key."""
    for index in range(MAX_SHARDS):
        shard = cluster_shard(index)
        assert shard.index == index
        assert key_slot(f"{shard.prefix}shiwu.bulk".encode()) == shard.slot


def test_shards_have_different_slots() -> None:
    """Two shards in one slot could not be moved apart."""
    assert len({cluster_shard(index).slot for index in range(MAX_SHARDS)}) == MAX_SHARDS


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 16, 24, 32, 48, 64, 100, 128, 171, 213, 255, 256])
def test_shards_are_spread_over_the_nodes(shards: int) -> None:
    """Any number of equal ranges of slots has its part of the first shards, give or take three."""
    slots = [cluster_shard(index).slot or 0 for index in range(shards)]
    for nodes in range(1, shards + 1):
        counts = Counter(slot * nodes // SLOTS for slot in slots)
        assert all(abs(counts.get(node, 0) - shards / nodes) <= 3 for node in range(nodes)), nodes


@pytest.mark.parametrize("nodes", range(1, 17))
def test_sixteen_shards_use_every_node(nodes: int) -> None:
    """No node has two more than another one."""
    counts = Counter((cluster_shard(index).slot or 0) * nodes // SLOTS for index in range(16))
    assert len(counts) == nodes
    assert max(counts.values()) - min(counts.values()) <= 1


def test_shard_of_an_id_is_its_checksum() -> None:
    """Known values of CRC-32: another function would look for a job in another shard."""
    assert [shard_of(job_id, shards=16) for job_id in ("k1", "熊猫", "")] == [9, 6, 0]
    assert {shard_of(f"job-{number}", shards=16) for number in range(300)} == set(range(16))


def test_one_server_has_no_prefix() -> None:
    """Keys are as they were before there were shards."""
    assert (ONE_SERVER.prefix, ONE_SERVER.index, ONE_SERVER.slot) == ("", 0, None)


@pytest.mark.parametrize("index", [-1, MAX_SHARDS])
def test_index_of_no_shard_is_refused(index: int) -> None:
    """There are 256 windows of slots."""
    with pytest.raises(ValueError, match="from 0 to 255"):
        cluster_shard(index)


def test_prefix_names_the_slot_of_its_shard() -> None:
    """Configurations of Celery have the prefix only."""
    shard = cluster_shard(3)
    assert (shard_with_prefix("{3fn}:").slot, shard_with_prefix("{3fn}:").prefix) == (shard.slot, shard.prefix)


@pytest.mark.parametrize("text", ["", "{}:", "3fn:", "{3fn}", "x{3fn}:", "{3f{n}:", "{3fn}::"])
def test_prefix_without_a_hash_tag_is_refused(text: str) -> None:
    """Its keys would have another slot each."""
    with pytest.raises(ValueError, match="the prefix of a shard"):
        shard_with_prefix(text)
