"""Which host and path a client of the object store asks, and which names of buckets are refused."""

from __future__ import annotations

import io
import socket
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.awsrequest import AWSResponse

from shiwu_worker.errors import Rejected
from shiwu_worker.policy.access_rules import SPECIAL_BUCKETS, AccessRules, allows_bucket
from shiwu_worker.policy.limits import S3Addressing, S3Client, S3Options
from shiwu_worker.stages.fetch.s3.base import S3Limits, StoreError, is_at
from shiwu_worker.stages.fetch.s3.boto import new_client
from shiwu_worker.stages.fetch.s3.obstore import ObstoreStore
from tests.support.picture_server import PictureServer
from tests.support.servers import S3Server
from tests.support.stores import BODY, PLAIN, each_client, failure, make_fetcher, make_store, read

pytestmark = pytest.mark.usefixtures("own_s3_names")

SPECIAL = ("x--evil--x-s3", "x--use1-az4--xa-s3", "x" * 20 + "--op-s3", "-".join("x" * 20) + "o0evil" + "--op-s3")


@each_client
@pytest.mark.parametrize("bucket", SPECIAL)
def test_bucket_that_chooses_an_endpoint_is_refused(http_server: PictureServer, client: S3Client, bucket: str) -> None:
    """Unless the operator allows names with that ending; then no request leaves the endpoint all the same."""
    refused = failure(make_fetcher(client, http_server.url("")), f"s3://{bucket}/k")
    assert (type(refused), refused.code.value) == (Rejected, "source_forbidden")
    named = AccessRules(allow_buckets=("x*",))
    assert not allows_bucket(named, bucket)
    assert allows_bucket(AccessRules(allow_buckets=(f"*--{bucket.rpartition('--')[2]}",)), bucket)
    assert not http_server.hits


def test_no_request_of_boto3_leaves_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 Express would ask a host below the endpoint, with the session's token; an alias of Outposts would ask AWS."""
    asked_urls: list[str] = []

    def send(self: object, request: Any) -> None:
        asked_urls.append(request.url)
        raise OSError("not sent in tests")

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", send)
    own, aws = "http://store.example:9000", None
    outpost = "test-accessp-" + "o0b1d075431d83bebde8xz5w8ijx1qzlbp3i3kuse10" + "--op-s3"
    for endpoint, bucket in ((own, "x--use1-az4--x-s3"), (own, "x--use1-az4--xa-s3"), (own, outpost)):
        with pytest.raises(StoreError):
            read(make_store("boto3", endpoint), "k", bucket=bucket)
    assert not [url for url in asked_urls if not url.startswith(f"{own}/")]
    asked_urls.clear()
    for bucket in ("pictures", "x--use1-az4--x-s3"):
        with pytest.raises(StoreError):
            read(make_store("boto3", aws), "k", bucket=bucket)
    assert [url.partition("//")[2].partition("/")[0] for url in asked_urls] == [
        "pictures.s3.amazonaws.com",
        "x--use1-az4--x-s3.s3express-use1-az4.us-east-1.amazonaws.com",
    ]


ADDRESSES: list[tuple[S3Addressing, str, str, str]] = [
    ("auto", "http://store.example:9000", "pictures", "http://store.example:9000/pictures/a"),
    ("path", "http://store.example:9000", "pictures", "http://store.example:9000/pictures/a"),
    ("virtual", "http://store.example:9000", "pictures", "http://pictures.store.example:9000/a"),
    ("virtual", "http://store.example", "my-pictures", "http://my-pictures.store.example/a"),
    ("virtual", "http://store.example:9000", "Pictures", "http://store.example:9000/Pictures/a"),
    ("virtual", "http://192.0.2.1:9000", "pictures", "http://192.0.2.1:9000/pictures/a"),
]


@each_client
@pytest.mark.parametrize("case", ADDRESSES, ids=str)
def test_bucket_is_in_the_path_or_the_host(
    http_server: PictureServer,
    client: S3Client,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[S3Addressing, str, str, str],
) -> None:
    """As the proxy of the environment sees it."""
    addressing, endpoint, bucket, url = case
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, http_server.url(""))
    monkeypatch.setenv("NO_PROXY", "")
    http_server.serve(url, PLAIN)
    assert read(make_store(client, endpoint, addressing=addressing), "a", bucket=bucket) == BODY
    assert http_server.hits == {url: 1}


@pytest.mark.parametrize(
    ("addressing", "url"),
    [
        ("auto", "https://pictures.s3.amazonaws.com/a"),
        ("virtual", "https://pictures.s3.amazonaws.com/a"),
        ("path", "https://s3.amazonaws.com/pictures/a"),
    ],
)
def test_addressing_applies_to_aws(monkeypatch: pytest.MonkeyPatch, addressing: S3Addressing, url: str) -> None:
    """By boto3, whose requests a test can catch."""
    sent_urls: list[str] = []

    def send(self: object, request: Any) -> None:
        sent_urls.append(request.url)
        raise OSError("not sent in tests")

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", send)
    with pytest.raises(StoreError):
        read(make_store("boto3", None, addressing=addressing), "a")
    assert sent_urls == [url]


def test_virtual_addressing_reads_from_a_real_store(real_store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By boto3, whose look-ups a test can answer; the signature covers the host."""
    look_up = socket.getaddrinfo

    def local(host: str, *args: Any, **options: Any) -> Any:
        return look_up("127.0.0.1" if host.endswith(real_store.domain) else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    real_store.put("virtual/a b.jpg", BODY)
    store = make_store("boto3", f"http://{real_store.domain}:{real_store.port}", addressing="virtual")
    assert read(store, "virtual/a b.jpg") == BODY
    with pytest.raises(StoreError, match="NoSuchKey"):
        read(store, "virtual/none")


@pytest.mark.parametrize(
    ("bucket", "url", "is_sent"),
    [
        ("pictures", "http://pictures.store.example:9000/k", True),
        ("pictures", "http://store.example:9000/pictures/k", True),
        ("pictures", "http://other.store.example:9000/k", False),
        ("pictures", "http://pictures.evil.example:9000/k", False),
        ("pictures", "https://pictures.store.example:9000/k", False),
        ("pictures", "http://pictures.store.example:80/k", False),
        ("x--use1-az4--x-s3", "http://x--use1-az4--x-s3.store.example:9000/k", False),
    ],
)
def test_virtual_host_is_the_bucket_below_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, bucket: str, url: str, is_sent: bool
) -> None:
    """Another host gets no request, whatever botocore makes of a name."""
    sent_urls: list[str] = []

    def send(self: object, request: Any) -> None:
        sent_urls.append(request.url)
        raise OSError("not sent in tests")

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", send)
    monkeypatch.setattr("botocore.awsrequest.AWSRequestPreparer._prepare_url", lambda *_: url)
    with pytest.raises(StoreError):
        read(make_store("boto3", "http://store.example:9000", addressing="virtual"), "k", bucket=bucket)
    assert sent_urls == ([url] if is_sent else [])


@pytest.mark.parametrize("suffix", SPECIAL_BUCKETS)
def test_name_with_a_reserved_suffix_needs_its_own_entry(suffix: str) -> None:
    """In any case of letters; a general entry does not allow it."""
    for name in (f"x{suffix}", f"x{suffix.upper()}"):
        assert not allows_bucket(AccessRules(), name)
        assert not allows_bucket(AccessRules(allow_buckets=("*", "x*")), name)
        assert allows_bucket(AccessRules(allow_buckets=("*", f"*{name[1:]}")), name)
        assert not allows_bucket(AccessRules(allow_buckets=(f"*{name[1:]}",), deny_buckets=("x*",)), name)
    assert allows_bucket(AccessRules(), f"x{suffix}x")


@pytest.mark.parametrize(
    "bucket",
    [
        "arn:aws:s3:us-east-1:1:accesspoint/a",
        "arn:aws:s3::1:accesspoint:m.mrap",
        "arn:aws:s3-object-lambda:us-east-1:1:accesspoint:a",
        "arn:aws:s3-outposts:us-east-1:1:outpost:o:accesspoint:a",
    ],
)
@each_client
def test_arn_in_place_of_a_bucket_is_refused(http_server: PictureServer, client: S3Client, bucket: str) -> None:
    """It would choose region, account and endpoint."""
    error = failure(make_fetcher(client, http_server.url("")), f"s3://{bucket}/k")
    assert (type(error), error.code.value) == (Rejected, "invalid_reference")
    assert not http_server.hits


@pytest.mark.parametrize(
    ("url", "endpoint", "is_same"),
    [
        ("http://h:9000/b/k", "http://h:9000", True),
        ("http://H:9000/b/k", "http://h:9000/base", True),
        ("http://h/b/k", "http://u:p@h:80", True),
        ("http://b.h:9000/k", "http://h:9000", False),
        ("http://h:9001/b/k", "http://h:9000", False),
        ("https://h:9000/b/k", "http://h:9000", False),
        ("https://b.s3.eu-west-1.amazonaws.com/k", "https://s3.us-east-1.amazonaws.com", True),
        ("https://b.s3.cn-north-1.amazonaws.com.cn/k", "https://s3.us-east-1.amazonaws.com", False),
        ("https://evilamazonaws.com/k", "https://s3.us-east-1.amazonaws.com", False),
        ("https://s3.amazonaws.com/k", "https://h", False),
    ],
)
def test_endpoint_is_compared_by_host_and_port(url: str, endpoint: str, is_same: bool) -> None:
    """All of one AWS partition counts as one."""
    assert is_at(url, endpoint) is is_same


@pytest.mark.parametrize("region", ["eu-west-1", "cn-north-1", "us-gov-west-1"])
@pytest.mark.parametrize("bucket", ["pictures", "with.dots", "UPPER", "under_score", "ab"])
def test_obstore_uses_the_aws_endpoint_of_boto3(region: str, bucket: str) -> None:
    """The bucket stands in front of the host where it can."""
    options, limits = S3Options(None, region, "obstore"), S3Limits(2, 1.0, 1.0, 1.0)
    client = new_client(boto3.session.Session(), options, limits)
    sent: list[str] = []

    def answer(request: Any, **_: object) -> AWSResponse:
        sent.append(request.url)
        return AWSResponse(request.url, 200, {}, io.BytesIO())

    client.meta.events.register("before-send.s3", answer)
    client.get_object(Bucket=bucket, Key="a")
    url = urlsplit(sent[0])
    config = ObstoreStore(options, limits)._store(bucket).config
    in_front = config["virtual_hosted_style_request"] in {"true", True}
    path = "/a" if in_front else f"/{bucket}/a"
    assert (config["endpoint"], path) == (f"https://{url.hostname}", url.path)
    assert config["region"] == region
