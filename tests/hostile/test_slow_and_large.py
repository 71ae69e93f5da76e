"""Servers that never end, in every part of an answer, and answers that are larger than they should be."""

from __future__ import annotations

import gzip
import time

import pytest

from shiwu_worker.errors import Rejected, Unavailable
from tests.hostile.conftest import BODY, PLAIN, SECRET, World, failure
from tests.support.http_texts import CHUNKED, OK, SLOW
from tests.support.picture_server import Reply
from tests.support.raw_server import RawServer, Script, says

TOTAL_S = 0.6
BUSY_S = 10.0
"""Time that a busy machine may add; without a deadline these servers never finish."""


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_slow_reply_ends_at_the_total_deadline(world: World, script: Script) -> None:
    """The server sends slowly, in any part of its answer, but is never silent for the read timeout."""
    with RawServer(script, pause_s=0.05) as server:
        fetcher = world.fetcher(total_timeout_s=TOTAL_S, ports=(server.port,))
        began_s = time.monotonic()
        error = failure(fetcher, f"http://good.example:{server.port}/a?{SECRET}")
        assert time.monotonic() - began_s < TOTAL_S + BUSY_S
    assert isinstance(error, Unavailable) or "redirects" in str(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_silent_server_is_given_up(world: World, scheme: str) -> None:
    """A silent handshake of TLS too."""
    with RawServer(says(b""), pause_s=30) as server:
        fetcher = world.fetcher(total_timeout_s=TOTAL_S, ports=(server.port,))
        began_s = time.monotonic()
        assert isinstance(failure(fetcher, f"{scheme}://good.example:{server.port}/a"), Unavailable)
        assert time.monotonic() - began_s < TOTAL_S + BUSY_S


def test_silent_name_server_is_given_up(world: World) -> None:
    """The resolver has no time-out of its own; the fetch has."""
    began_s = time.monotonic()
    error = failure(world.fetcher(total_timeout_s=TOTAL_S), world.url("http://slow.example:OUT/a"))
    assert isinstance(error, Unavailable)
    assert time.monotonic() - began_s < TOTAL_S + BUSY_S


LARGE = {
    "one long header": says(OK + b"X: " + b"x" * 70_000 + b"\r\n\r\n" + BODY),
    "many bytes of headers": says(OK + b"".join(b"X%d: %s\r\n" % (n, b"x" * 2000) for n in range(60)) + b"\r\n" + BODY),
    "many headers": says(OK + b"".join(b"X%d: y\r\n" % n for n in range(200)) + b"\r\n" + BODY),
    "endless headers": says(OK, then=b"X: y\r\n" * 1000),
    "endless answers before": says(then=b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless status line": says(b"HTTP/1.1 200 ", then=b"O" * 10_000),
    "no HTTP": says(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "nothing": says(),
    "two lengths": says(OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"),
    "a broken chunk": says(CHUNKED + b"zz\r\nabc"),
    "cut short": says(OK + b"Content-Length: 50\r\n\r\nabc"),
    "a chunk cut short": says(CHUNKED + b"ff\r\nabc"),
}


@pytest.mark.parametrize("script", LARGE.values(), ids=LARGE)
def test_malformed_reply_counts_as_unavailable_source(
    world: World, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    """The fetch ends soon, and no log line of a library has the query."""
    with RawServer(script) as server:
        fetcher = world.fetcher(ports=(server.port,), total_timeout_s=30.0, read_timeout_s=30.0)
        began_s = time.monotonic()
        error = failure(fetcher, f"http://good.example:{server.port}/a?{SECRET}")
        assert time.monotonic() - began_s < 20
    assert isinstance(error, Unavailable)
    assert SECRET not in caplog.text


def test_broken_headers_are_not_logged_with_the_url(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """urllib3 would warn with the whole of it."""
    with RawServer(says(OK + b"no header at all\r\n\r\n" + BODY)) as server:
        assert world.fetcher(ports=(server.port,)).fetch(f"http://good.example:{server.port}/a?{SECRET}")
    assert SECRET not in caplog.text


def test_more_bytes_than_allowed_are_not_read(world: World) -> None:
    """By the declared length and by the bytes received; a wrong length does not avoid the limit."""
    url = world.url("http://good.example:OUT/large")
    for reply in (Reply(body=b"x" * 10_001), Reply(body=b"", content_length=10_001)):
        world.outer.serve("/large", reply)
        assert failure(world.fetcher(), url).code.value == "picture_too_large"
    world.outer.serve("/large", Reply(body=b"x" * 10_000))
    assert len(world.fetcher().fetch(url)) == 10_000
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    for script in (
        says(CHUNKED, then=chunk),
        says(OK + b"\r\n", then=b"x" * 4096),
        says(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", then=b"x"),
        says(OK + b"Content-Length: -5\r\n\r\n", then=b"x" * 4096),
        says(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", then=chunk),
    ):
        with RawServer(script) as server:
            error = failure(world.fetcher(ports=(server.port,)), f"http://good.example:{server.port}/a")
        assert error.code.value == "picture_too_large", error


@pytest.mark.parametrize(
    "encoding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "gzip, identity", "identity, br", "x"]
)
def test_compressed_body_is_rejected(world: World, encoding: str) -> None:
    """It is not asked for, and 50 MB of it fit into 50 KB."""
    world.outer.serve("/packed", Reply(body=gzip.compress(BODY), headers={"Content-Encoding": encoding}))
    error = failure(world.fetcher(), world.url("http://good.example:OUT/packed"))
    assert isinstance(error, Rejected)
    assert error.code.value == "not_a_picture"
    assert "compressed with gzip" in str(error)
    assert world.outer.headers["/packed"]["Accept-Encoding"] == "identity"


def test_requests_reveal_nothing_of_the_worker(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cookie, no referrer, no credentials, also not after a redirect."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    world.outer.serve("/moved", Reply(status=302, headers={"Location": "/a", "Set-Cookie": f"a={SECRET}"}))
    world.outer.serve("/a", PLAIN)
    world.fetcher().fetch(world.url("http://good.example:OUT/moved"))
    assert set(world.outer.headers["/a"]) == {"Host", "Accept-Encoding", "User-Agent", "Accept"}
