"""The configuration of a stock Celery application: for one server, for sentinels, and for a shard of a cluster."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from celery import Celery

from shiwu.broker.sharding import CelerySlotSSLConnection, cluster_shard
from shiwu.celery import options
from shiwu.errors import RedisUrlError

CLUSTER = "cluster://user:se%40cret@a:1,[::1]:2/?shards=4"
PREFIX = {"global_keyprefix": "{3fn}:", "cluster_nodes": "a:1,[::1]:2"}


def application(url: str, *, shard: int = 0) -> Celery:
    """A stock application with this configuration."""
    app = Celery("application", set_as_current=False)
    app.conf.update(options(url, shard=shard))
    return app


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("valkey://:p@host/3", "redis://:p@host:6379/3"),
        ("rediss://host/", "rediss://host:6379/0"),
        ("sentinel://a,b:2/main/1", "sentinel://a:26379/1;sentinel://b:2/1"),
    ],
)
def test_one_server_gets_the_options_of_celery(url: str, expected: str) -> None:
    """Nothing of shiwu is in them; sentinels need the name of the primary."""
    found = options(url)
    assert found["broker_url"] == found["result_backend"] == expected
    more = {"master_name": "main", "sentinel_kwargs": {"username": None, "password": None}}
    assert found["broker_transport_options"] == (more if "sentinel" in url else {})
    assert found["result_backend_transport_options"] == found["broker_transport_options"]
    tls = {"ssl_cert_reqs": ssl.CERT_REQUIRED} if "rediss" in url else None
    assert found["broker_use_ssl"] == found["redis_backend_use_ssl"] == tls


def test_shard_has_its_prefix_on_both_sides() -> None:
    """Also all nodes, of which one may be away; the login is in the URL only."""
    found = options(CLUSTER, shard=3)
    assert found["broker_url"] == found["result_backend"] == "shiwu+cluster://user:se%40cret@a:1/0"
    assert found["result_backend_transport_options"] == PREFIX
    assert found["broker_transport_options"] == PREFIX | {"socket_timeout": 10.0}
    assert options(CLUSTER)["broker_transport_options"]["global_keyprefix"] == cluster_shard(0).prefix


def test_celery_finds_transport_and_backend_of_a_shard() -> None:
    """No password is in the texts that Celery logs."""
    app = application(CLUSTER, shard=3)
    with app.connection_for_write() as connection:
        assert type(connection.transport).__module__ == "shiwu.celery.transport"
        assert connection.as_uri() == "shiwu+cluster://user:**@a:1/0"
    assert app.backend.as_uri() == "cluster://user:**@a:1/0"
    made: Any = app.backend.client.connection_pool.connection_kwargs
    assert (made["username"], made["password"], made["shard"].slot) == ("user", "se@cret", cluster_shard(3).slot)
    assert not {"host", "port"} & made.keys()
    app.close()


def test_both_sides_of_a_shard_use_tls() -> None:
    """And check the certificates of the nodes."""
    app = application("clusters://a:1/?ssl_check_hostname=false&shards=1")
    pool: Any = app.backend.client.connection_pool
    assert pool.connection_class is CelerySlotSSLConnection
    assert pool.connection_kwargs["ssl_cert_reqs"] == ssl.CERT_REQUIRED
    assert pool.connection_kwargs["ssl_check_hostname"] is False
    assert app.connection_for_write().ssl == {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": False}
    app.close()


@pytest.mark.parametrize(("url", "shard"), [("redis://a", 1), (CLUSTER, 4), (CLUSTER, -1)])
def test_shard_that_does_not_exist_is_refused(url: str, shard: int) -> None:
    """One server has one, with the index 0."""
    with pytest.raises(ValueError, match="expected the index of a shard from 0 to"):
        options(url, shard=shard)


def test_invalid_url_is_refused_without_its_password() -> None:
    """As everywhere."""
    with pytest.raises(RedisUrlError) as caught:
        options("cluster://:secret@a/?shards=0")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cluster_nodes", "global_keyprefix"])
def test_incomplete_options_of_a_shard_are_refused(missing: str) -> None:
    """Without a prefix keys would go to any node."""
    app = application(CLUSTER)
    del app.conf.result_backend_transport_options[missing]
    with pytest.raises(ValueError, match=r"shiwu\.celery\.options|prefix of a shard"):
        _ = app.backend.client
    app.close()
