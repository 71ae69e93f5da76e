"""A revoke over shards: it holds in all that answer, and the caller hears of one that does not."""

from __future__ import annotations

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shiwu.contract import REVOKED
from shiwu_worker.celery_worker.revoke import Revoker, ShardedRevoker
from tests.support.redis_parts import make_answer_store


def revoker(client: redis.Redis) -> Revoker:
    """That of one shard."""
    return Revoker(client, make_answer_store(client, "revoke"))


def test_revoke_holds_in_all_shards_that_answer(redis_client: redis.Redis, redis_url: str) -> None:
    """The error comes after the others are done, so that the operator revokes again."""
    other = redis.Redis.from_url(f"{redis_url[:-1]}6")
    away = redis.Redis(port=1, retry=Retry(NoBackoff(), 0))
    with other, away:
        other.flushdb()
        assert ShardedRevoker([revoker(redis_client), revoker(other)]).revoke(["first"]) == 0
        with pytest.raises(redis.ConnectionError):
            ShardedRevoker([revoker(redis_client), revoker(away), revoker(other)]).revoke(["second"])
        for client in (redis_client, other):
            assert client.zmscore(REVOKED, ["first", "second"]).count(None) == 0
        other.flushdb()
