"""Both clients of the object store do the same, with a real store and with one that notes what it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import Rejected, Unavailable
from shiwu_worker.policy.limits import S3Client
from shiwu_worker.stages.fetch.s3.base import ObjectStore, StoreError, StoreUnavailable, WrongName
from tests.support.picture_server import PictureServer, Reply
from tests.support.raw_server import RawServer, says
from tests.support.servers import S3Server
from tests.support.stores import BODY, CLIENTS, PLAIN, SECRET, each_client, failure, make_fetcher, make_store, read

pytestmark = pytest.mark.usefixtures("own_s3_names")


@each_client
def test_real_store_gives_objects_and_errors(
    real_store: S3Server, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole objects, missing keys and buckets, wrong credentials, a store that is away."""
    fetcher = make_fetcher(client, real_store.endpoint_url)
    assert fetcher.fetch(real_store.put("fetch/猫 一+1.jpg", BODY)) == BODY
    assert fetcher.fetch(real_store.put("fetch/empty", b"")) == b""
    large = failure(fetcher, real_store.put("fetch/large", b"x" * 20_000))
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
    wrong = failure(make_fetcher(client, real_store.endpoint_url), "s3://pictures/fetch/none")
    assert (type(wrong), wrong.code.value) == (Unavailable, "source_credentials")


@each_client
def test_versions_of_an_object_are_read(real_store: S3Server, client: S3Client) -> None:
    """The one that is asked for."""
    bucket = f"versions-{client}"
    versions: dict[str, Any] = {"Bucket": bucket}
    real_store.client.create_bucket(**versions)
    real_store.client.put_bucket_versioning(**versions, VersioningConfiguration={"Status": "Enabled"})
    old, new = (
        real_store.client.put_object(**versions, Key="a", Body=text)["VersionId"]
        for text in (b"the old one", b"the new one")
    )
    fetcher = make_fetcher(client, real_store.endpoint_url)
    assert fetcher.fetch(f"s3://{bucket}/a?versionId={old}") == b"the old one"
    assert fetcher.fetch(f"s3://{bucket}/a?versionId={new}") == b"the new one"
    assert fetcher.fetch(f"s3://{bucket}/a") == b"the new one"


@each_client
def test_keys_are_used_as_written(real_store: S3Server, client: S3Client) -> None:
    """Nothing in a key is decoded, cut off or made plain."""
    fetcher = make_fetcher(client, real_store.endpoint_url)
    keys = ("a b", "a%20b", "a+b", "a?b=c", "a#b", "照片.jpg", "é", "e\u0301", "a&b;c=d", "~a'(b)*!", "%2e%2e", "a\\b")
    for key in keys:
        real_store.put(f"keys/{key}", key.encode())
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
