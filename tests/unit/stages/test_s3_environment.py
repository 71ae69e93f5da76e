"""Credentials, headers, proxies and certificates of both clients of the object store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.credentials import ReadOnlyCredentials

from shiwu_worker.errors import Unavailable
from shiwu_worker.policy.limits import S3Client
from shiwu_worker.stages.fetch.s3.base import MAX_BUCKET_CLIENTS, NoCredentials, StoreUnavailable
from shiwu_worker.stages.fetch.s3.boto import S3Access
from shiwu_worker.stages.fetch.s3.obstore import ObstoreStore
from tests.support.certificates import Certificate
from tests.support.picture_server import PictureServer, Reply
from tests.support.raw_server import RawServer, says
from tests.support.stores import BODY, PLAIN, SECRET, each_client, failure, make_fetcher, make_store, read

pytestmark = pytest.mark.usefixtures("own_s3_names")


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
    """Soon, and once for all threads: otherwise the time limit of fetch and decode would reject the images."""
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
