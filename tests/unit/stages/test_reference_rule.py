"""Producers and workers refuse the same references as malformed, because both ask one rule of the contract."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shiwu.contract import ErrorCode, RequestError, parse_request
from shiwu.network.http_client import HttpClient
from shiwu_worker.errors import JobError
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import FetchLimits, S3Options
from shiwu_worker.stages.fetch.fetcher import Fetcher

NOTHING = AccessRules(deny_networks=("0.0.0.0/0", "::/0"), deny_buckets=("*",), allow_folders=(Path("/nowhere"),))
ODD = "aZ0-._~:@[]%/?#\\ \t\n\x00\x7f\u00a0\u3000\u2028\u200b\u200d\ue000\u0378猫é①。ｌ☃℀ßא$*,'\"<>{}|^`\ud800"


def unknown(host: str, port: int) -> Sequence[tuple[socket.AddressFamily, str]]:
    """No name exists."""
    raise socket.gaierror(socket.EAI_NONAME, host)


@pytest.fixture(scope="module")
def fetcher() -> Fetcher:
    """A worker's fetcher whose rules refuse every address, so that it never connects."""
    limits = FetchLimits(max_bytes=1, total_timeout_s=5.0, connect_timeout_s=1.0, read_timeout_s=1.0)
    client = HttpClient(NOTHING, threads=1, connect_timeout_s=1.0, read_timeout_s=1.0, resolve=unknown)
    return Fetcher(s3=S3Options(None, "us-east-1"), http_client=client, access=NOTHING, limits=limits, threads=1)


def is_accepted(image: str) -> bool:
    """Whether a producer may send it."""
    try:
        parse_request({"image": image})
    except RequestError as error:
        return error.code is not ErrorCode.INVALID_REFERENCE
    return True


def is_malformed(fetcher: Fetcher, image: str) -> bool:
    """Whether the worker says that it is no reference at all."""
    with pytest.raises(JobError) as caught:
        fetcher.fetch(image)
    return caught.value.code is ErrorCode.INVALID_REFERENCE


hosts = st.one_of(
    st.text(ODD, max_size=6),
    st.sampled_from(["h", "例え.jp", "[::1]", "[1::2:3.4.5.6]", "[1:2]", "[::1", "127.1", "a..b", "x" * 64, "user@h"]),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
ports = st.one_of(st.just(""), st.integers(-1, 70_000).map(lambda port: f":{port}"), st.text(":0x1", max_size=3))
urls = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http", "https", "HTTP"]),
    st.sampled_from(["://"] * 6 + [":/", ":", ":///"]),
    hosts,
    ports,
    st.text(f"{ODD}//??", max_size=6).map(lambda text: f"/{text}"),
)


@given(image=urls)
@example("https://h/ x")
@example("https://h/a\\b")
@example("https://h/\u00a0")
@example("https://h/\ue000👩‍👧.jpg")
@example("https://☃.example/a")
@example("https://h:/a")
@example("https://h:0/a")
@example("https://h:000080/a")
@example("https://*,$(id)/a")
@example("http://" + "x" * 300 + "/a")
def test_urls_are_malformed_on_both_sides_or_on_none(fetcher: Fetcher, image: str) -> None:
    """What a producer may send the worker tries to fetch; what it may not send the worker refuses."""
    assert is_malformed(fetcher, image) is not is_accepted(image)


@given(bucket=st.text("aZ0-._:@/?%猫 !", max_size=8))
@example("_b")
@example("a" * 256)
def test_buckets_are_malformed_on_both_sides_or_on_none(fetcher: Fetcher, bucket: str) -> None:
    """The store is not asked: all buckets are forbidden here."""
    image = f"s3://{bucket}/key"
    assert is_malformed(fetcher, image) is not is_accepted(image)


@given(path=st.text("a/.%0A1f猫 ?#", max_size=10))
@example("a%00b")
@example("%7F")
def test_paths_are_malformed_on_both_sides_or_on_none(fetcher: Fetcher, path: str) -> None:
    """Control characters may stand behind `%`."""
    image = f"file:///{path}"
    assert is_malformed(fetcher, image) is not is_accepted(image)


def test_error_of_a_space_says_what_to_write() -> None:
    with pytest.raises(RequestError, match="image: expected a URL without white space and backslashes; write %20"):
        parse_request({"image": "https://h/ x"})


def test_error_of_a_bucket_says_what_one_is() -> None:
    with pytest.raises(RequestError, match=r"image: expected a bucket of letters and digits, .*, got 's3://_b/k'"):
        parse_request({"image": "s3://_b/k"})
