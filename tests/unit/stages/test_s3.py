"""Both clients of the object store do the same, with a real store and with one that notes what it is asked."""

from __future__ import annotations

import io
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import Rejected, Unavailable
from shiwu_worker.policy.access_rules import SPECIAL_BUCKETS, AccessRules, allows_bucket
from shiwu_worker.policy.limits import S3Addressing, S3Client, S3Options
from shiwu_worker.stages.fetch.s3.base import (
    MAX_BUCKET_CLIENTS,
    NoCredentials,
    ObjectStore,
    S3Limits,
    StoreError,
    StoreUnavailable,
    WrongName,
    is_at,
)
from shiwu_worker.stages.fetch.s3.boto import S3Access, new_client
from shiwu_worker.stages.fetch.s3.obstore import ObstoreStore
from tests.support.certificates import Certificate
from tests.support.picture_server import PictureServer, Reply
from tests.support.raw_server import RawServer, says
from tests.support.servers import S3Server
from tests.support.stores import CLIENTS, OWN_NAMES, SECRET, failure, make_fetcher, make_store, read

BODY = b"x" * 5000
PLAIN = Reply(body=BODY)


each_client = pytest.mark.parametrize("client", CLIENTS)


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of nobody."""
    for name, value in OWN_NAMES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def real(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The real store, with credentials that it knows."""
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


# -------------------------------------------------------------------------------- a real store
@each_client
def test_real_store_gives_objects_and_errors(real: S3Server, client: S3Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole objects, missing keys and buckets, wrong credentials, a store that is away."""
    fetcher = make_fetcher(client, real.endpoint_url)
    assert fetcher.fetch(real.put("fetch/猫 一+1.jpg", BODY)) == BODY
    assert fetcher.fetch(real.put("fetch/empty", b"")) == b""
    large = failure(fetcher, real.put("fetch/large", b"x" * 20_000))
    assert (type(large), large.code.value) == (Rejected, "picture_too_large")
    for reference, code in {
        "s3://pictures/fetch/none": "source_not_found",
        "s3://no-such-bucket/none": "source_not_found",
        "s3://pictures/fetch/none?versionId=none": "source_not_found",
        "s3://no bucket!/fetch/none": "invalid_reference",
        "s3://pictures/fetch/": "source_not_a_file",
    }.items():
        error = failure(fetcher, reference)
        assert (type(error), error.code.value) == (Rejected, code), reference
    away = failure(make_fetcher(client, "http://127.0.0.1:1", total_timeout_s=1.0), "s3://pictures/x")
    assert (type(away), away.code.value) == (Unavailable, "source_unavailable")
    assert str(away).startswith("S3 did not answer (")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    wrong = failure(make_fetcher(client, real.endpoint_url), "s3://pictures/fetch/none")
    assert (type(wrong), wrong.code.value) == (Unavailable, "source_credentials")


@each_client
def test_versions_of_an_object_are_read(real: S3Server, client: S3Client) -> None:
    """The one that is asked for."""
    bucket = f"versions-{client}"
    versions: dict[str, Any] = {"Bucket": bucket}
    real.client.create_bucket(**versions)
    real.client.put_bucket_versioning(**versions, VersioningConfiguration={"Status": "Enabled"})
    old, new = (
        real.client.put_object(**versions, Key="a", Body=text)["VersionId"] for text in (b"the old one", b"the new one")
    )
    fetcher = make_fetcher(client, real.endpoint_url)
    assert fetcher.fetch(f"s3://{bucket}/a?versionId={old}") == b"the old one"
    assert fetcher.fetch(f"s3://{bucket}/a?versionId={new}") == b"the new one"
    assert fetcher.fetch(f"s3://{bucket}/a") == b"the new one"


@each_client
def test_keys_are_used_as_written(real: S3Server, client: S3Client) -> None:
    """Nothing in a key is decoded, cut off or made plain."""
    fetcher = make_fetcher(client, real.endpoint_url)
    keys = ("a b", "a%20b", "a+b", "a?b=c", "a#b", "照片.jpg", "é", "e\u0301", "a&b;c=d", "~a'(b)*!", "%2e%2e", "a\\b")
    for key in keys:
        real.put(f"keys/{key}", key.encode())
    for key in keys:
        assert fetcher.fetch(f"s3://pictures/keys/{key}") == key.encode()
    assert fetcher.fetch("S3://pictures/keys/a#b") == b"a#b"
    missing = failure(fetcher, "s3://pictures/keys/none?x=1#2")
    assert "s3://pictures/keys/none?x=1#2" in str(missing)


def test_missing_client_is_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do."""
    monkeypatch.setenv("SHIWU_S3_CLIENT", "obstore")
    assert Settings().s3_client == "obstore"
    monkeypatch.setattr("shiwu_worker.config.types.find_spec", lambda _: None)
    with pytest.raises(ValidationError, match=r"pip install '\.\[worker,obstore\]'"):
        Settings()
    monkeypatch.setenv("SHIWU_S3_CLIENT", "s3fs")
    with pytest.raises(ValidationError, match="'boto3' or 'obstore'"):
        Settings()


# -------------------------------------------------------------------------------- what a store is asked
def asked(server: PictureServer, store: ObjectStore, key: str) -> str | None:
    """The path that the store sees, or nothing where the key is refused."""
    server.clear()
    try:
        read(store, key)
    except WrongName:
        assert not server.hits
        return None
    except StoreError:
        pass
    [path] = server.hits
    return path


def test_no_key_is_changed_to_another(http_server: PictureServer) -> None:
    """obstore asks for the same path as boto3, or refuses the key."""
    boto, other = (make_store(client, http_server.url("")) for client in CLIENTS)

    @given(key=st.text(st.sampled_from("ab./%?#+&= 照\\~:@\t\x7f'<é"), min_size=1, max_size=12))
    def same(key: str) -> None:
        expected = f"/pictures/{quote(key, safe='/~')}"
        assert asked(http_server, boto, key) == expected
        is_odd = any(part in {"", ".", ".."} for part in key.split("/")) or not key.isprintable()
        assert asked(http_server, other, key) == (None if is_odd else expected)

    same()


@pytest.mark.parametrize("key", ["a//b", "/a", "../x", "a/./b", "a\tb"])
def test_error_for_a_key_of_obstore_tells_the_remedy(http_server: PictureServer, key: str) -> None:
    """And boto3 takes it."""
    error = failure(make_fetcher("obstore", http_server.url("")), f"s3://pictures/{key}")
    assert (type(error), error.code.value) == (Rejected, "invalid_reference")
    assert "SHIWU_S3_CLIENT=boto3 takes any" in str(error)
    http_server.serve(f"/pictures/{quote(key)}", PLAIN)
    assert make_fetcher("boto3", http_server.url("")).fetch(f"s3://pictures/{key}") == BODY


ANSWERS = [
    (404, "NoSuchKey", Rejected, "source_not_found"),
    (405, "MethodNotAllowed", Rejected, "source_not_found"),
    (403, "AccessDenied", Rejected, "source_forbidden"),
    (403, "SignatureDoesNotMatch", Unavailable, "source_credentials"),
    (400, "NewCode", Unavailable, "source_error"),
]
"""Some; `test_error_table` has all."""


@pytest.mark.parametrize(("status", "code", "kind", "expected"), ANSWERS, ids=str)
def test_refusal_has_the_same_text_for_both_clients(
    http_server: PictureServer, status: int, code: str, kind: type[Exception], expected: str
) -> None:
    """By both clients, also for a key that pretends to be an answer."""
    key = "Server returned non-2xx status code: 503 <Code>SlowDown</Code>"
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
    http_server.serve(f"/pictures/{quote(key)}", Reply(status=status, body=text))
    fetchers = [make_fetcher(client, http_server.url("")) for client in CLIENTS]
    errors = [failure(fetcher, f"s3://pictures/{key}?versionId=v") for fetcher in fetchers]
    assert {(type(error), error.code.value) for error in errors} == {(kind, expected)}
    assert len({(str(error), error.detail) for error in errors}) == 1
    assert f"S3 answered {code} (HTTP {status}): s3://pictures/Server" in f"{errors[0]} {errors[0].detail}"


@each_client
def test_client_tries_once(http_server: PictureServer, client: S3Client) -> None:
    """Tries are the fetcher's."""
    http_server.serve("/pictures/a", Reply.error(503))
    with pytest.raises(StoreError):
        read(make_store(client, http_server.url("")), "a")
    assert http_server.hits == {"/pictures/a": 1}


def test_store_that_asks_for_a_pause_is_requested_once(http_server: PictureServer) -> None:
    """By boto3; obstore does not tell the headers of an error. The pause is the bucket's."""
    busy = Reply(status=503, headers={"Retry-After": "20"}, body=b"<Error><Code>SlowDown</Code></Error>")
    http_server.serve("/pictures/a", busy)
    http_server.serve("/other/a", PLAIN)
    fetcher = make_fetcher("boto3", http_server.url(""))
    for reference in ("s3://pictures/a", "s3://pictures/b"):
        error = failure(fetcher, reference)
        assert isinstance(error, Unavailable)
        assert error.code.value == "source_throttled"
        assert error.retry_after_s is not None
        assert 10 < error.retry_after_s <= 20
    assert http_server.hits == {"/pictures/a": 1}
    assert fetcher.fetch("s3://other/a") == BODY


INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
OBJECT = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"


@each_client
def test_interim_replies_of_a_store_are_skipped(client: S3Client) -> None:
    """To botocore they are the reply, of an object without bytes."""
    with RawServer(says(INTERIM + OBJECT)) as server:
        assert read(make_store(client, f"http://127.0.0.1:{server.port}"), "a") == b"abc"


@each_client
def test_reply_of_another_protocol_is_no_object(client: S3Client) -> None:
    """After status 101 the connection no longer carries HTTP."""
    with RawServer(says(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OBJECT)) as server:
        error = failure(make_fetcher(client, f"http://127.0.0.1:{server.port}"), "s3://pictures/a")
    assert (type(error), error.code.value) == (Unavailable, "source_error")


@pytest.mark.parametrize("head", [b"206 Partial\r\nContent-Range: bytes 0-2/9", b"206 Partial", b"204 No Content"])
def test_part_of_an_object_is_rejected(head: bytes) -> None:
    """By boto3; obstore does not tell the status."""
    with RawServer(says(OBJECT.replace(b"200 OK", head))) as server, pytest.raises(StoreUnavailable):
        read(make_store("boto3", f"http://127.0.0.1:{server.port}"), "a")


@each_client
def test_unreadable_headers_count_as_half_a_reply(client: S3Client) -> None:
    """A date or a length that is none."""
    for header in (b"Last-Modified: yesterday", b"Content-Length: some"):
        reply = OBJECT.replace(b"Content-Length: 3", header)
        with RawServer(says(reply)) as server, pytest.raises(StoreUnavailable):
            read(make_store(client, f"http://127.0.0.1:{server.port}"), "a")


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


def test_virtual_addressing_reads_from_a_real_store(real: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By boto3, whose look-ups a test can answer; the signature covers the host."""
    look_up = socket.getaddrinfo

    def local(host: str, *args: Any, **options: Any) -> Any:
        return look_up("127.0.0.1" if host.endswith(real.domain) else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    real.put("virtual/a b.jpg", BODY)
    store = make_store("boto3", f"http://{real.domain}:{real.port}", addressing="virtual")
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


@each_client
def test_anonymous_requests_have_no_signature(
    http_server: PictureServer, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With credentials around or without any."""
    http_server.serve("/pictures/a", PLAIN)
    for _ in range(2):
        store = make_store(client, http_server.url(""), is_anonymous=True)
        assert read(store, "a") == BODY
        assert not {"authorization", "x-amz-security-token"} & sent_headers(http_server).keys()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)


@each_client
def test_requester_pays_only_if_the_operator_sets_it(http_server: PictureServer, client: S3Client) -> None:
    """The header goes into the signature."""
    http_server.serve("/pictures/a", PLAIN)
    read(make_store(client, http_server.url("")), "a")
    assert "x-amz-request-payer" not in sent_headers(http_server)
    read(make_store(client, http_server.url(""), requester_pays=True), "a")
    assert sent_headers(http_server)["x-amz-request-payer"] == "requester"
    assert "x-amz-request-payer" in sent_headers(http_server)["authorization"]


@each_client
def test_requests_to_a_store_name_their_sender(http_server: PictureServer, client: S3Client) -> None:
    """As the operator says; boto3 adds the version of botocore."""
    http_server.serve("/pictures/a", PLAIN)
    read(make_store(client, http_server.url(""), user_agent="our tagger/1.0 (ops@example.org)"), "a")
    told = sent_headers(http_server)["user-agent"].partition(" Botocore/")[0]
    assert told == "our tagger/1.0 (ops@example.org)"


def sent_headers(server: PictureServer) -> dict[str, str]:
    """The headers of the last request, by names in lower case."""
    return {name.lower(): value for name, value in server.headers["/pictures/a"].items()}


# -------------------------------------------------------------------------------- what the environment says
@each_client
@pytest.mark.parametrize("missing", [("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_SECRET_ACCESS_KEY",)])
def test_without_credentials_no_request_is_sent(
    http_server: PictureServer, client: S3Client, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, or half of them."""
    for name in missing:
        monkeypatch.delenv(name)
    error = failure(make_fetcher(client, http_server.url("")), "s3://pictures/a")
    assert (type(error), error.code.value) == (Unavailable, "source_credentials")
    assert str(error) == str(NoCredentials())
    assert not http_server.hits


@each_client
def test_later_credentials_are_used(
    http_server: PictureServer, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine's metadata may be late: a client that was made without credentials is not kept."""
    monkeypatch.setattr("shiwu_worker.stages.fetch.s3.boto.CHAIN_RETRY_PAUSE_S", 0.0)
    http_server.serve("/pictures/a", PLAIN)
    store = make_store(client, http_server.url(""))
    with monkeypatch.context() as bare:
        bare.delenv("AWS_ACCESS_KEY_ID")
        bare.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(NoCredentials):
            read(store, "a")
    assert read(store, "a") == BODY


@each_client
def test_error_of_another_service_is_no_refusal(
    http_server: PictureServer, tmp_path: Path, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AccessDenied by the service that gives out credentials says nothing about the object."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("a token")
    denied = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>m</Message></Error></ErrorResponse>"
    with PictureServer(posts=Reply(status=403, body=denied)) as sts:
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/r")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url(""))
        error = failure(make_fetcher(client, http_server.url("")), "s3://pictures/a")
    assert (type(error), error.code.value) == (Unavailable, "source_credentials")
    assert "AssumeRoleWithWebIdentity answered AccessDenied" in str(error)
    assert not http_server.hits


@each_client
def test_silent_credential_service_is_given_up(
    tmp_path: Path, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, and once for all threads: otherwise the time limit of fetch and decode would blame the images."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("a token")
    monkeypatch.setattr("shiwu_worker.stages.fetch.s3.boto.CHAIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr("shiwu_worker.stages.fetch.s3.boto.CHAIN_RETRY_PAUSE_S", 60.0)
    with RawServer(says(b""), pause_s=300) as sts:
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/r")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{sts.port}")
        fetcher = make_fetcher(client, "http://127.0.0.1:1")
        with ThreadPoolExecutor(4) as threads:
            errors = list(threads.map(lambda _: failure(fetcher, "s3://pictures/a"), range(4)))
        assert {(type(error), error.code.value) for error in errors} == {(Unavailable, "source_credentials")}
        assert sts.connections == 1


@pytest.mark.parametrize("kind", ["get", "stream"])
def test_panic_of_obstore_fails_one_job(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no Exception, and would end the thread of the loader."""

    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> Any:
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    broken = SimpleNamespace(stream=panic, meta={"size": 1})
    monkeypatch.setattr("obstore.get", panic if kind == "get" else lambda *_, **__: broken)
    error = failure(make_fetcher("obstore", "http://127.0.0.1:1"), "s3://pictures/a")
    assert (type(error), error.code.value) == (Unavailable, "source_error")
    assert "PanicException" in str(error)


@each_client
def test_endpoint_and_proxy_are_read_as_by_the_aws_sdk(
    http_server: PictureServer, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no setting of ours says otherwise; NO_PROXY counts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", http_server.url(""))
    http_server.serve("/pictures/a", PLAIN)
    assert read(make_store(client, None), "a") == BODY
    with PictureServer() as proxy:
        proxy.serve("http://s3.example/pictures/a", Reply(body=b"by the proxy"))
        monkeypatch.setenv("HTTP_PROXY", proxy.url(""))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert read(make_store(client, "http://s3.example"), "a") == b"by the proxy"
        assert read(make_store(client, http_server.url("")), "a") == BODY


@each_client
def test_variables_of_other_programs_have_no_effect(
    http_server: PictureServer, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What obstore would read by itself: another store, no signature, another proxy, any certificate."""
    with PictureServer(address="127.0.0.2") as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", other.url(""))
        monkeypatch.setenv("AWS_ENDPOINT", other.url(""))
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        monkeypatch.setenv("AWS_PROXY_URL", other.url(""))
        monkeypatch.setenv("AWS_BUCKET", "other")
        http_server.serve("/pictures/a", PLAIN)
        assert read(make_store(client, http_server.url("")), "a") == BODY
        assert not other.hits
    headers = {name.lower(): value for name, value in http_server.headers["/pictures/a"].items()}
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=key/")
    assert headers["x-amz-security-token"] == f"{SECRET}-token"


@each_client
def test_certificate_bundle_is_that_of_the_aws_sdk(
    tmp_path: Path, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store with a certificate of one's own is not trusted without it."""
    certificate = Certificate.make(tmp_path, name="localhost")
    with PictureServer(tls=certificate.server_context()) as server:
        server.serve("/pictures/a", PLAIN)
        url = f"https://localhost:{server.port}"
        with pytest.raises(StoreUnavailable):
            read(make_store(client, url), "a")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.path))
        assert read(make_store(client, url), "a") == BODY


# -------------------------------------------------------------------------------- obstore's stores
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


def test_stores_are_bounded_and_follow_credentials(http_server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name buckets, so only the clients used last are kept; changed keys take effect immediately."""
    store = make_store("obstore", http_server.url(""))
    assert isinstance(store, ObstoreStore)
    buckets = [f"bucket-{number}" for number in range(MAX_BUCKET_CLIENTS + 4)]
    for bucket in (*buckets, buckets[4], "last"):
        http_server.serve(f"/{bucket}/a", PLAIN)
        assert read(store, "a", bucket=bucket) == BODY
    assert list(store._stores) == [*buckets[6:], buckets[4], "last"]

    def changed() -> S3Access:
        return replace(access(), credentials=ReadOnlyCredentials("other", "secret", None))

    access = store._clients.get
    monkeypatch.setattr(store._clients, "get", changed)
    assert read(store, "a", bucket="last") == BODY
    headers = {name.lower(): value for name, value in http_server.headers["/last/a"].items()}
    assert "Credential=other/" in headers["authorization"]
    assert "x-amz-security-token" not in headers
