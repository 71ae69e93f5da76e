"""SHIWU_REDIS_URL: the accepted forms, and the errors for others, which never quote a password."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from shiwu import Client
from shiwu.broker.redis_url import RedisAddress, read_redis_url
from shiwu.celery import celery_url
from shiwu.errors import RedisUrlError
from shiwu_worker.config.settings import Settings

CHECKED = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("redis://host", {"hosts": (("host", 6379),)}),
    ("valkey://host:7000/3", {"hosts": (("host", 7000),), "database": 3}),
    (" redis://host/\n", {"hosts": (("host", 6379),)}),
    ("REDIS://host?db=3", {"hosts": (("host", 6379),), "database": 3}),
    ("redis:///2", {"hosts": (("localhost", 6379),), "database": 2}),
    ("redis://[::1]:7000/0", {"hosts": (("::1", 7000),)}),
    ("redis://:p%40%2Fs%25@host", {"hosts": (("host", 6379),), "password": "p@/s%"}),
    ("redis://user:pa:ss@host", {"hosts": (("host", 6379),), "username": "user", "password": "pa:ss"}),
    ("redis://user:p@ss@host", {"hosts": (("host", 6379),), "username": "user", "password": "p@ss"}),
    ("rediss://host/0", {"hosts": (("host", 6379),), "tls": CHECKED}),
    ("valkeys://host/0", {"hosts": (("host", 6379),), "tls": CHECKED}),
    (
        "rediss://host?ssl_cert_reqs=CERT_NONE&ssl_check_hostname=False",
        {"hosts": (("host", 6379),), "tls": {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}},
    ),
    *(
        (
            f"rediss://host?ssl_check_hostname={word}",
            {"hosts": (("host", 6379),), "tls": CHECKED | {"ssl_check_hostname": is_checked}},
        )
        for word, is_checked in {"true": True, "YES": True, "1": True, "false": False, "no": False, "0": False}.items()
    ),
    ("rediss://host?ssl_cert_reqs=required", {"hosts": (("host", 6379),), "tls": CHECKED}),
    (
        "rediss://host?ssl_cert_reqs=Optional&ssl_min_version=1.3",
        {
            "hosts": (("host", 6379),),
            "tls": {"ssl_cert_reqs": ssl.CERT_OPTIONAL, "ssl_min_version": ssl.TLSVersion.TLSv1_3},
        },
    ),
    ("unix:///run/redis.sock", {"socket_path": "/run/redis.sock"}),
    (
        "unix://u:p@/run/a%20b.sock?db=4",
        {"socket_path": "/run/a b.sock", "database": 4, "username": "u", "password": "p"},
    ),
    ("redis+socket:///run/redis.sock?virtual_host=4", {"socket_path": "/run/redis.sock", "database": 4}),
    (
        "sentinel://user:p%40ss@a:1,b,[::1]:3/primary/2?sentinel_password=other",
        {
            "hosts": (("a", 1), ("b", 26379), ("::1", 3)),
            "primary": "primary",
            "database": 2,
            "username": "user",
            "password": "p@ss",
            "sentinel_password": "other",
        },
    ),
    ("sentinel://a/primary", {"hosts": (("a", 26379),), "primary": "primary"}),
    (
        "sentinel://a/primary?sentinel_username=s&sentinel_password=p",
        {"hosts": (("a", 26379),), "primary": "primary", "sentinel_username": "s", "sentinel_password": "p"},
    ),
]
REFUSED = [
    ("", "empty"),
    ("  ", "empty"),
    ("host:6379", "without ://"),
    ("amqp://:secret@host//", "got amqp://"),
    ("http://:secret@host", "got http://"),
    ("redis-cluster://:secret@host", "got redis-cluster://"),
    ("redis://:secret@host/99999999999", "number of a database"),
    ("redis://:secret@host/main", "number of a database"),
    ("redis://:secret@host/-1", "number of a database"),
    ("redis://:secret@host/0/1", "number of a database"),
    ("redis://:secret@host/0?db=3", "another in the query"),
    ("redis://:secret@host:port", "port"),
    ("redis://:secret@host:70000", "port"),
    ("redis://:secret@[::1/0", "IPv6"),
    ("redis://:secret@::1:6379/0", "IPv6"),
    ("redis://:secret@a,b/0", "sentinel://"),
    ("redis://:secret@a;redis://b", "number of a database|sentinel://"),
    ("redis://:sec#ret@host/0", "%23"),
    ("redis://:secret@ho\nst/0", "one line"),
    ("redis://:secret@host?protocol=3", "protocol: .*leave it out"),
    ("redis://:secret@host?socket_timeout=3", "SHIWU_REDIS_TIMEOUT_S"),
    ("redis://:secret@host?max_connections=3", "max_connections of Client"),
    ("redis://u:12?secret@host/0", "a part after `\\?`: shiwu does not know"),
    ("secret@h://x", "got …://"),
    ("redis://:secret@host?colour=3", "colour: .*does not know"),
    ("redis://:secret@host?db=1&db=2", "once"),
    ("redis://:secret@host?ssl_cert_reqs=none", "ssl_cert_reqs: expected rediss://"),
    ("sentinel://:secret@a/p?ssl_ca_certs=/x", "ssl_ca_certs: expected rediss://"),
    ("rediss://:secret@host?ssl_cert_reqs=sometimes", "ssl_cert_reqs: expected one of none"),
    ("rediss://:secret@host?ssl_check_hostname=perhaps", "ssl_check_hostname: expected one of true"),
    ("rediss://:secret@host?ssl_ca_certs=/no/such/file", "ssl_ca_certs: expected a file"),
    ("rediss://:secret@host?ssl_keyfile=/no/such/file", "ssl_keyfile: expected a file"),
    ("unix://:secret@host/path", "unix:///path"),
    ("unix://", "unix:///path"),
    ("sentinel://:secret@a:1", "master-name"),
    ("sentinel://:secret@/primary", "master-name"),
    ("sentinel://:secret@a:x/p", "port"),
    ("sentinel://a/p/secret", "number of a database"),
    ("sentinel://:secret@a/p/0/1", "master-name"),
]
CLUSTERS = [
    ("cluster://a", {"hosts": (("a", 6379),), "shards": 16}),
    ("clusters://a:7/0", {"hosts": (("a", 7),), "shards": 16, "tls": CHECKED}),
    (
        "cluster://user:p%40ss@a:1,[::1]:2/?shards=256",
        {"hosts": (("a", 1), ("::1", 2)), "shards": 256, "username": "user", "password": "p@ss"},
    ),
]
CLUSTERS_REFUSED = [
    ("cluster://:secret@", "a node at least"),
    ("cluster://:secret@a,/", "a node at least"),
    ("cluster://:secret@a/1", "database 0"),
    ("cluster://:secret@a/?db=1", "database 0"),
    ("cluster://:secret@a:x/", "port"),
    *((f"cluster://:secret@a/?shards={text}", "from 1 to 256") for text in ("0", "257", "-1", "1.5", "x", "³")),
    ("cluster://:secret@a/?shards=1&shards=2", "once"),
    ("cluster://:secret@a/?ssl_ca_certs=/x", "clusters://"),
    ("cluster://:secret@a/?protocol=3", "leave it out"),
    ("redis://:secret@a/?shards=3", "does not know"),
]


@pytest.mark.parametrize(("url", "expected"), FORMS, ids=[url for url, _ in FORMS])
def test_redis_url_is_parsed(url: str, expected: dict[str, Any]) -> None:
    """Parts are decoded once, missing parts have defaults, and a server's certificate is checked by default."""
    assert read_redis_url(url) == RedisAddress(**expected)


@pytest.mark.parametrize(("url", "expected"), CLUSTERS, ids=[url for url, _ in CLUSTERS])
def test_cluster_url_is_parsed_where_shards_are_used(url: str, expected: dict[str, Any]) -> None:
    """The nodes, the login and the number of shards."""
    assert read_redis_url(url, may_be_cluster=True) == RedisAddress(**expected)


@pytest.mark.parametrize(("url", "words"), CLUSTERS_REFUSED, ids=[url for url, _ in CLUSTERS_REFUSED])
def test_invalid_cluster_url_is_refused(url: str, words: str) -> None:
    """The text says what was expected and quotes no password."""
    with pytest.raises(RedisUrlError, match=words) as caught:
        read_redis_url(url, may_be_cluster=True)
    assert "secret" not in str(caught.value)


def test_cluster_is_refused_where_shards_are_not_used() -> None:
    """Without the password; the worker's settings accept it."""
    with pytest.raises(RedisUrlError, match="got cluster://, which this program cannot use yet") as caught:
        read_redis_url("cluster://:secret@host/")
    assert "secret" not in str(caught.value)
    assert Settings(redis_url="cluster://:secret@host/").redis_address.shards == 16  # type: ignore[arg-type]  # pydantic reads the text


def test_redis_url_with_tls_files_is_parsed(tmp_path: Path) -> None:
    """Paths are percent-decoded, and the files must exist."""
    (tmp_path / "c a.pem").write_text("x")
    address = read_redis_url(f"rediss://host/0?ssl_ca_certs={tmp_path}/c%20a.pem&ssl_ca_path={tmp_path}&ssl_password=s")
    assert address.tls == {
        **CHECKED,
        "ssl_ca_certs": f"{tmp_path}/c a.pem",
        "ssl_ca_path": str(tmp_path),
        "ssl_password": "s",
    }


@pytest.mark.parametrize(("url", "words"), REFUSED, ids=[repr(url) for url, _ in REFUSED])
def test_invalid_redis_url_is_refused_everywhere(url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser, the worker's settings and the client raise the same error, whose text may go into a log."""
    monkeypatch.setenv("SHIWU_REDIS_URL", url)
    for read in (lambda: read_redis_url(url), lambda: Client(url), Client, Settings):
        with pytest.raises(ValueError, match=words) as caught:
            read()
        assert "secret" not in str(caught.value)
        assert "sec#ret" not in str(caught.value)
    with pytest.raises(RedisUrlError):
        Client(url)


@pytest.mark.parametrize("url", [url for url, _ in FORMS if "ssl_" not in url])
def test_celery_url_reads_back_as_the_same_address(url: str) -> None:
    """The parser reads the URLs for Celery back as the same address, host by host."""
    address = read_redis_url(url)
    for given, host in zip(celery_url(address).split(";"), address.hosts or [None], strict=True):
        back = read_redis_url(given.replace("sentinel://", "redis://"))
        assert (back.hosts, back.socket_path) == ((host,) if host else (), address.socket_path)
        assert (back.database, back.username, back.password) == (address.database, address.username, address.password)
        assert (back.tls is None) == (address.tls is None)


def test_redis_address_hides_password() -> None:
    """Its text may go into a log or a traceback."""
    address = read_redis_url("sentinel://user:secret@a/p?sentinel_password=secret2")
    assert "secret" not in repr(address)


@pytest.mark.parametrize(("character", "is_control"), [("\x1f", True), ("\n", True), ("\x20", False)])
def test_redis_url_has_no_control_characters(character: str, *, is_control: bool) -> None:
    """A space is none, whatever else is wrong with it."""
    with pytest.raises(RedisUrlError) as caught:
        read_redis_url(f"redis://h{character}x:1/zero")
    assert ("control characters" in str(caught.value)) is is_control
