"""An object store that dawdles, lies about sizes, or sends its clients elsewhere."""

from __future__ import annotations

import time

import pytest

from shiwu_worker.errors import Rejected, Unavailable
from shiwu_worker.policy.limits import S3Client
from tests.hostile.conftest import INNER
from tests.support.http_texts import CHUNKED, OK, SLOW
from tests.support.picture_server import PictureServer, Reply
from tests.support.raw_server import RawServer, Script, says
from tests.support.stores import CLIENTS, OWN_NAMES, failure, make_fetcher

TOTAL_S = 0.6
BUSY_S = 10.0
"""A client is made on the way, which takes a busy machine seconds; without a deadline these stores never finish."""
each_client = pytest.mark.parametrize("client", CLIENTS)
AWAY = {
    "cut short": says(OK + b"Content-Length: 50\r\n\r\nabc"),
    "a broken chunk": says(CHUNKED + b"zz\r\nabc"),
    "no HTTP": says(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "nothing": says(),
}


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that no store knows."""
    for name, value in OWN_NAMES.items():
        monkeypatch.setenv(name, value)


@each_client
@pytest.mark.parametrize("name", ["body", "chunk", "small chunks"])
def test_slow_body_ends_at_the_total_deadline(client: S3Client, name: str) -> None:
    """Never silent for the read time-out."""
    _is_left_in_time(client, SLOW[name], pause_s=0.05)


@pytest.mark.parametrize("name", ["status line", "header", "headers", "answers before the answer"])
def test_obstore_ends_slow_headers(name: str) -> None:
    """boto3 bounds one silence and not the whole of them; there the time for fetch and decode ends it."""
    _is_left_in_time("obstore", SLOW[name], pause_s=0.05)


@each_client
def test_silent_store_is_given_up(client: S3Client) -> None:
    """After one silence."""
    _is_left_in_time(client, says(b""), pause_s=30)


def _is_left_in_time(client: S3Client, script: Script, *, pause_s: float) -> None:
    with RawServer(script, pause_s=pause_s) as server:
        url = f"http://127.0.0.1:{server.port}"
        fetcher = make_fetcher(client, url, total_timeout_s=TOTAL_S, read_timeout_s=TOTAL_S)
        began_s = time.monotonic()
        assert isinstance(failure(fetcher, "s3://pictures/a"), Unavailable)
        assert time.monotonic() - began_s < TOTAL_S + BUSY_S


@each_client
@pytest.mark.parametrize("script", AWAY.values(), ids=AWAY)
def test_half_a_reply_counts_as_unavailable_store(client: S3Client, script: Script) -> None:
    """Never half an image."""
    with RawServer(script) as server:
        fetcher = make_fetcher(client, f"http://127.0.0.1:{server.port}", total_timeout_s=TOTAL_S)
        assert isinstance(failure(fetcher, "s3://pictures/a"), Unavailable)


@each_client
def test_more_bytes_than_allowed_are_not_read(client: S3Client) -> None:
    """By the declared length and by the bytes received; without a length obstore reads nothing."""
    for script in (
        says(OK + b"Content-Length: 10001\r\n\r\n"),
        says(OK + b"Content-Length: 99999999999\r\n\r\n", then=b"x"),
        says(OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", then=b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    ):
        with RawServer(script) as server:
            error = failure(make_fetcher(client, f"http://127.0.0.1:{server.port}"), "s3://pictures/a")
        assert error.code.value == "picture_too_large", error
    with RawServer(says(CHUNKED, then=b"1000\r\n" + b"x" * 4096 + b"\r\n")) as server:
        expected, total_s = {"boto3": ("picture_too_large", 5.0), "obstore": ("source_unavailable", TOTAL_S)}[client]
        fetcher = make_fetcher(client, f"http://127.0.0.1:{server.port}", total_timeout_s=total_s)
        assert failure(fetcher, "s3://pictures/a").code.value == expected


@each_client
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_of_a_store_are_not_followed(http_server: PictureServer, client: S3Client, status: int) -> None:
    """No request, and with it no token, reaches another host."""
    with PictureServer(address=INNER) as inner:
        inner.serve("/a", Reply(body=b"internal data"))
        http_server.serve("/pictures/a", Reply.redirect(inner.url("/a"), status=status))
        error = failure(make_fetcher(client, http_server.url(""), total_timeout_s=TOTAL_S), "s3://pictures/a")
        assert not inner.hits
    assert isinstance(error, Rejected | Unavailable)


@each_client
def test_bucket_in_another_region_is_refused(http_server: PictureServer, client: S3Client) -> None:
    """A redirect without a target: the worker's region is wrong, not the image, and the store is asked once."""
    http_server.serve("/pictures/a", Reply(status=301, body=b"<Error><Code>PermanentRedirect</Code></Error>"))
    error = failure(make_fetcher(client, http_server.url("")), "s3://pictures/a")
    assert (type(error), error.code.value) == (Unavailable, "source_credentials")
    assert http_server.hits == {"/pictures/a": 1}
