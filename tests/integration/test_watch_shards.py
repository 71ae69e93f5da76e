"""`shiwu watch` whose jobs go to the shards of a real cluster. MinIO's events are in a server of their own."""

from __future__ import annotations

import json
from pathlib import Path

import redis

from shiwu.broker.sharding import PoolOptions, open_shards, shard_of
from shiwu.contract import WATCH_UNREAD, Lane
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.watch import KEY, access_event, run_watch, waiting_jobs, write_rules

SHARDS = 6


def test_events_become_jobs_of_their_shards(
    cluster: ValkeyCluster, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Each once, although each event came twice. What could not be read is kept in the first shard."""
    url, source = cluster.url(shards=SHARDS), f"{redis_url}?key={KEY}"
    events = [access_event(f"{number}.jpg") for number in range(60)]
    redis_client.rpush(KEY, *events, b"nonsense", *events)
    rules = str(write_rules(tmp_path))
    checked = run_watch(url, source, "--rules", rules, "--check")
    assert (checked.exit_code, "redis: all 6 shards answer" in checked.output) == (0, True), checked.output
    done = run_watch(url, source, "--rules", rules, "--once")
    assert done.exit_code == 0, done.output
    assert redis_client.llen(KEY) == 0
    images = []
    for shard in open_shards(url, PoolOptions(timeout_s=5)):
        with shard:
            found = waiting_jobs(shard, Lane.BULK)
            assert found
            assert {shard_of(job_id, shards=SHARDS) for job_id, _ in found} == {shard.shard.index}
            images += [image for _, image in found]
            assert shard.llen(WATCH_UNREAD) == (1 if shard.shard.index == 0 else 0)
    assert sorted(images) == sorted(f"s3://photos/{number}.jpg" for number in range(60))
    unread = run_watch(url, "--unread")
    assert json.loads(unread.output)["body"] == "nonsense"
