"""Every source but S3, well and badly behaved: bytes, or an error that says whether trying again may help."""

from __future__ import annotations

import gzip
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from shiwu.contract import ErrorCode
from shiwu.network.http_replies import retry_after_s
from shiwu_worker.errors import JobError, Rejected, Unavailable, Unreachable
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.stages.fetch.fetcher import Fetcher
from shiwu_worker.stages.fetch.source_pauses import MAX_SOURCES, SourcePauses
from tests.support.clock import Clock
from tests.support.fetchers import make_fetcher
from tests.support.picture_server import PictureServer, Reply
from tests.support.raw_server import RawServer, says

BODY = b"x" * 5000


def code_of(fetcher: Fetcher, reference: str) -> tuple[type[JobError], str]:
    """The kind and code of the error that a fetch ends with; its text never holds a query."""
    with pytest.raises(JobError) as caught:
        fetcher.fetch(reference)
    assert "secret" not in str(caught.value)
    return type(caught.value), caught.value.code.value


def test_whole_body_is_read_over_http(http_server: PictureServer) -> None:
    """What the server has is what we get, also after a redirect and with a query."""
    http_server.serve("/a.png", Reply.picture(BODY))
    moved = http_server.serve("/moved", Reply.redirect("/a.png"))
    fetcher = make_fetcher()
    assert fetcher.fetch(moved) == BODY
    assert fetcher.fetch(http_server.url("/a.png") + "?secret=1") == BODY
    assert fetcher.fetch(http_server.url("/a.png").replace("http:", "HTTP:")) == BODY


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        (Reply.error(404), Rejected, "source_not_found"),
        (Reply.error(410), Rejected, "source_not_found"),
        (Reply.error(403), Rejected, "source_forbidden"),
        (Reply.error(500), Unavailable, "source_unavailable"),
        (Reply.error(429), Unavailable, "source_throttled"),
        (Reply.error(400), Unavailable, "source_error"),
        (Reply.redirect("/again"), Rejected, "source_forbidden"),
        (Reply.redirect("file:///etc/passwd"), Rejected, "source_forbidden"),
        (Reply.redirect("http://10.0.0.1/secret"), Unreachable, "source_unavailable"),
        (Reply.picture(b"x" * 20_000), Rejected, "picture_too_large"),
        (Reply.gzipped(BODY), Rejected, "not_a_picture"),
        (Reply.cut(BODY), Unavailable, "source_unavailable"),
        (Reply.picture(BODY).late(first_pause_s=30.0), Unavailable, "source_unavailable"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else None),
)
def test_failing_http_source_gives_its_code(
    http_server: PictureServer, reply: Reply, kind: type[JobError], code: str
) -> None:
    """Statuses, redirects that lead nowhere or where they must not, too many bytes, encodings, early ends, silence."""
    url = http_server.serve("/again", reply) + "?secret=1"
    assert code_of(make_fetcher(), url) == (kind, code)


PNG = b"\x89PNG\r\n\x1a\n" + BODY


@pytest.mark.parametrize(
    "encoding",
    ["", "identity", "identity, identity", "aws-chunked", "utf-8", "UTF-8", "none", "binary", "8bit", "gzip", "br"],
)
def test_plain_body_is_used_whatever_its_encoding_header(http_server: PictureServer, encoding: str) -> None:
    """The bytes decide: they begin like an image."""
    url = http_server.serve("/a", Reply(body=PNG, headers={"Content-Encoding": encoding}))
    assert make_fetcher().fetch(url) == PNG


@pytest.mark.parametrize(
    ("body", "encoding", "name"),
    [
        (gzip.compress(PNG), "", "gzip"),
        (gzip.compress(PNG), "aws-chunked,gzip", "gzip"),
        (zlib.compress(PNG), "deflate", "deflate"),
        (b"\x0b\x02\x80brotli", "br", "br"),
        (b"\x28\xb5\x2f\xfd" + BODY, "utf-8", "zstd"),
    ],
    ids=["gzip", "gzip and a header", "deflate", "br", "zstd"],
)
def test_compressed_body_is_rejected_by_name(
    http_server: PictureServer, tmp_path: Path, body: bytes, encoding: str, name: str
) -> None:
    """With what to do; what the bytes tell is told of files and objects too."""
    url = http_server.serve("/a", Reply(body=body, headers={"Content-Encoding": encoding}))
    with pytest.raises(Rejected, match=f"compressed with {name}; store or serve it uncompressed") as caught:
        make_fetcher().fetch(url)
    assert caught.value.code is ErrorCode.NOT_A_PICTURE
    if name in {"gzip", "zstd"}:
        (tmp_path / "a").write_bytes(body)
        with pytest.raises(Rejected, match=f"compressed with {name}"):
            make_fetcher(access=AccessRules(allow_folders=(tmp_path,))).fetch((tmp_path / "a").as_uri())


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
REPLIES = {
    "early hints": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK, b"abc"),
    "several": (b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" * 5 + OK, b"abc"),
    "too many": (b"HTTP/1.1 102 Processing\r\n\r\n" * 20 + OK, ErrorCode.SOURCE_UNAVAILABLE),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK, ErrorCode.SOURCE_ERROR),
    "by a proxy": (OK.replace(b"200 OK", b"203 Non-Authoritative Information"), b"abc"),
    "all as a part": (OK.replace(b"200 OK", b"206 Partial\r\nContent-Range: bytes 0-2/3"), b"abc"),
    "its first part": (OK.replace(b"200 OK", b"206 Partial\r\nContent-Range: bytes 0-2/9"), ErrorCode.SOURCE_ERROR),
    "some part": (OK.replace(b"200 OK", b"206 Partial"), ErrorCode.SOURCE_ERROR),
}


@pytest.mark.parametrize(("reply", "expected"), REPLIES.values(), ids=REPLIES)
def test_statuses_near_200_give_a_whole_body_or_an_error(reply: bytes, expected: bytes | ErrorCode) -> None:
    """Interim replies are read past; of an image there is all or nothing."""
    with RawServer(says(reply)) as server:
        fetcher = make_fetcher(access=AccessRules(allow_hosts=("127.0.0.1",)))
        if isinstance(expected, bytes):
            assert fetcher.fetch(f"http://127.0.0.1:{server.port}/a") == expected
        else:
            assert code_of(fetcher, f"http://127.0.0.1:{server.port}/a") == (Unavailable, expected.value)


AT = "Fri, 01 Jan 2027 00:00:00 GMT"
AFTER = [
    ({"Retry-After": "20"}, 20.0),
    ({"Retry-After": " 0 "}, 0.0),
    ({"Retry-After": "9" * 400}, float("9" * 18)),
    ({"Retry-After": "Fri, 01 Jan 2027 00:01:30 GMT", "Date": AT}, 90.0),
    ({"Retry-After": "Thu, 31 Dec 2026 00:00:00 GMT", "Date": AT}, 0.0),
    ({"Retry-After": "Friday, 01-Jan-27 00:01:30 GMT", "Date": AT}, 90.0),
    ({"Retry-After": "soon"}, None),
    ({"Retry-After": "-5"}, None),
    ({"Retry-After": "\u0663"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("headers", "pause_s"), AFTER, ids=str)
def test_pause_is_read_as_seconds_or_as_a_date(headers: dict[str, str], pause_s: float | None) -> None:
    """A moment by the server's own clock, where it tells that."""
    assert retry_after_s(headers) == pause_s


def test_pause_without_date_header_uses_the_own_clock() -> None:
    """Servers without a clock send no Date."""
    pause_s = retry_after_s({"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)})
    assert pause_s is not None
    assert 20 < pause_s <= 30


@pytest.mark.parametrize(("status", "code"), [(429, "source_throttled"), (503, "source_unavailable")])
def test_source_that_asks_for_a_pause_is_requested_once(http_server: PictureServer, status: int, code: str) -> None:
    """No quick tries, and no other job of that host asks it before the pause is over; that is no attempt of theirs."""
    url = http_server.serve("/busy", Reply(status=status, headers={"Retry-After": "20"}))
    other = http_server.serve("/other", Reply.picture(BODY))
    fetcher = make_fetcher()
    for reference, is_untried in ((url, False), (url, True), (other, True)):
        with pytest.raises(Unavailable) as caught:
            fetcher.fetch(reference)
        assert (caught.value.code.value, caught.value.is_untried) == (code, is_untried)
        assert caught.value.retry_after_s is not None
        assert 10 < caught.value.retry_after_s <= 20
    assert http_server.hits == {"/busy": 1}


def test_pause_that_is_over_is_forgotten(http_server: PictureServer) -> None:
    """A pause that is too long counts as the longest."""
    url = http_server.serve("/a", Reply(status=429, headers={"Retry-After": "9999999"}), Reply.picture(BODY))
    fetcher, clock = make_fetcher(), Clock()
    fetcher._pauses = SourcePauses(longest_s=300.0, clock=clock.monotonic)
    assert code_of(fetcher, url) == (Unavailable, "source_throttled")
    clock.now_s += 299
    assert code_of(fetcher, url) == (Unavailable, "source_throttled")
    clock.now_s += 2
    assert fetcher.fetch(url) == BODY


def test_throttling_source_gets_no_quick_retries(http_server: PictureServer) -> None:
    """Also without Retry-After; a source that fails gets three."""
    throttling = http_server.serve("/throttling", Reply.error(429))
    failing = http_server.serve("/failing", Reply.error(500))
    fetcher = make_fetcher()
    assert code_of(fetcher, throttling) == (Unavailable, "source_throttled")
    assert code_of(fetcher, failing) == (Unavailable, "source_unavailable")
    assert http_server.hits == {"/throttling": 1, "/failing": 3}


def test_sources_that_asked_for_a_pause_are_bounded() -> None:
    """Producers name them."""
    pauses = SourcePauses(longest_s=60.0)
    reply = Unavailable(ErrorCode.SOURCE_THROTTLED, "busy", retry_after_s=50.0)
    for number in range(MAX_SOURCES + 1):
        pauses.note(f"h{number}:80", reply)
    pauses.check("h0:80")
    with pytest.raises(Unavailable):
        pauses.check("h1:80")


@pytest.mark.parametrize("most", [0, 1, 5])
def test_redirects_are_followed_up_to_the_limit(http_server: PictureServer, most: int) -> None:
    """And no further; none at all with 0."""
    for number in range(1, 7):
        http_server.serve(f"/{number}", Reply.redirect(f"/{number - 1}"))
    http_server.serve("/0", Reply.picture(BODY))
    fetcher = make_fetcher(max_redirects=most)
    assert fetcher.fetch(http_server.url(f"/{most}")) == BODY
    assert code_of(fetcher, http_server.url(f"/{most + 1}")) == (Rejected, "source_forbidden")


@pytest.mark.parametrize("most", [1, 20])
def test_every_redirect_is_checked_like_the_reference(http_server: PictureServer, most: int) -> None:
    """Whatever their number: an inner address behind the last of them is refused."""
    url = http_server.serve("/a", Reply.redirect("http://10.0.0.1/a"))
    assert code_of(make_fetcher(max_redirects=most), url) == (Unreachable, "source_unavailable")


def test_requests_to_web_servers_name_their_sender(http_server: PictureServer) -> None:
    """As the operator says; also after a redirect."""
    http_server.serve("/a", Reply.picture(BODY))
    url = http_server.serve("/moved", Reply.redirect("/a"))
    assert make_fetcher(user_agent="our tagger/1.0").fetch(url) == BODY
    assert {headers["User-Agent"] for headers in http_server.headers.values()} == {"our tagger/1.0"}


def test_slow_body_ends_at_the_total_deadline(http_server: PictureServer) -> None:
    """A server that sends a byte now and then is never silent for the read time-out; the total deadline cuts it."""
    url = http_server.serve("/drip", Reply.picture(BODY).drip(chunk_bytes=1, pause_s=0.1))
    began_s = time.monotonic()
    assert code_of(make_fetcher(total_timeout_s=0.8), url) == (Unavailable, "source_unavailable")
    assert time.monotonic() - began_s < 20


def test_refused_address_and_closed_port_give_their_codes(http_server: PictureServer) -> None:
    """Both are told alike; only the closed port is worth another try."""
    url = http_server.serve("/a", Reply.picture(BODY))
    assert code_of(make_fetcher(access=AccessRules()), url) == (Unreachable, "source_unavailable")
    assert code_of(make_fetcher(), "http://127.0.0.1:1/a") == (Unavailable, "source_unavailable")
    assert code_of(make_fetcher(access=AccessRules(tells_refusals=True)), url) == (Rejected, "source_forbidden")


def test_only_files_of_allowed_folders_are_read(tmp_path: Path) -> None:
    """Symbolic links are resolved first; callers do not learn what exists outside; folders and pipes are no files."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a b.png").write_bytes(BODY)
    (inside / "link.png").symlink_to(outside / "a b.png")
    fetcher = make_fetcher(access=AccessRules(allow_folders=(inside,)))
    assert fetcher.fetch((inside / "a b.png").as_uri()) == BODY
    for path, code in [
        (inside / "link.png", "source_forbidden"),
        (outside / "a b.png", "source_forbidden"),
        (outside / "none.png", "source_forbidden"),
        (inside / ".." / "out" / "a b.png", "source_forbidden"),
        (inside / "none.png", "source_not_found"),
        (inside, "source_not_a_file"),
        (inside / ("a" * 300), "invalid_reference"),
        (inside / "a b.png?x", "source_not_found"),
        (inside / "a b.png#x", "source_not_found"),
    ]:
        assert code_of(fetcher, f"file://{path}") == (Rejected, code), path
    for name in ("a?x", "a#1.png", "a%41"):
        (inside / name).write_bytes(name.encode())
        assert fetcher.fetch(f"FILE://{inside}/{name.replace('%', '%25')}") == name.encode()


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("none.png", r"FileNotFoundError \(No such file or directory\)"),
        ("a" * 300, r"OSError \(File name too long\)"),
        ("file/a.png", r"NotADirectoryError \(Not a directory\)"),
    ],
)
def test_unreadable_file_is_named_by_its_error(tmp_path: Path, name: str, got: str) -> None:
    """What was expected, and what the system says, without a path of the worker."""
    (tmp_path / "file").write_bytes(BODY)
    fetcher = make_fetcher(access=AccessRules(allow_folders=(tmp_path,)))
    with pytest.raises(JobError, match=f"^expected a file that the worker can read, got {got}$"):
        fetcher.fetch(f"file://{tmp_path}/{name}")


def test_body_below_the_least_rate_is_asked_for_once() -> None:
    """It would keep the thread until the deadline, and a quick second try would keep it as long again."""
    drip = says(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n", then=b"x")
    with RawServer(drip, pause_s=0.05) as server:
        fetcher = make_fetcher(total_timeout_s=60.0, min_bytes_per_s=1000, min_rate_after_s=0.5)
        with pytest.raises(Unavailable, match=r"at least 1000 bytes/s on average, got \d+ bytes") as caught:
            fetcher.fetch(f"http://127.0.0.1:{server.port}/a")
        assert server.connections == 1
    assert caught.value.code is ErrorCode.SOURCE_UNAVAILABLE


@pytest.mark.parametrize("min_bytes_per_s", [0, 50])
def test_body_above_the_least_rate_is_read_to_its_end(min_bytes_per_s: int) -> None:
    """Some sources are slow by nature; 0 turns the check off."""
    pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n", *[b"x" * 30] * 10]
    with RawServer(says(*pieces), pause_s=0.1) as server:
        fetcher = make_fetcher(total_timeout_s=60.0, min_bytes_per_s=min_bytes_per_s, min_rate_after_s=0.2)
        assert fetcher.fetch(f"http://127.0.0.1:{server.port}/a") == b"x" * 300
