"""Which form of the marks of answered ids a worker chooses for the database that it finds."""

from __future__ import annotations

import pytest
import redis

from shiwu.broker.retention import RetentionPublisher
from shiwu.contract import RETENTION
from shiwu_worker.config import views
from shiwu_worker.config.settings import Settings
from shiwu_worker.service.marks import choose_marks
from tests.support.processes import free_ports


def chosen(url: str, marks: str = "auto") -> str:
    """What a worker with this setting uses."""
    return choose_marks(Settings(redis_url=url, marks=marks)).marks  # type: ignore[arg-type]  # pydantic reads texts


def test_new_databases_get_hashes(redis_url: str, redis_client: redis.Redis) -> None:
    """Also the second worker, and in a cluster, where the number of shards is kept before any limits."""
    assert chosen(redis_url) == "hashes"
    redis_client.hset(RETENTION, "shards", "16")
    assert chosen(redis_url) == "hashes"
    settings = choose_marks(Settings(redis_url=redis_url))  # type: ignore[arg-type]  # pydantic reads texts
    RetentionPublisher(redis_client, views.retention(settings))()
    assert chosen(redis_url) == "hashes"


def test_databases_of_earlier_versions_keep_both(redis_url: str, redis_client: redis.Redis) -> None:
    """Their workers published limits without a form of marks."""
    redis_client.hset(RETENTION, mapping={"result_ttl_s": 3600, "done_ttl_s": 3600})
    assert chosen(redis_url) == "both"
    redis_client.hset(RETENTION, "old_marks", 1)
    assert chosen(redis_url) == "both"


@pytest.mark.parametrize("marks", ["both", "hashes"])
def test_a_form_that_is_set_holds(redis_url: str, marks: str) -> None:
    """Whatever the database says."""
    assert chosen(redis_url, marks) == marks


def test_without_redis_it_is_both() -> None:
    """That is right with any database."""
    assert chosen(f"redis://127.0.0.1:{free_ports(1)[0]}/0") == "both"
