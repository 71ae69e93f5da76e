"""`shiwu-worker --check` and the settings of S3: what is proved, what is not, and what the start refuses."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from pydantic import ValidationError

from shiwu_worker.commands.s3_check import check_s3
from shiwu_worker.config.settings import Settings
from shiwu_worker.policy.limits import S3Client
from shiwu_worker.stages.fetch.s3.base import NoCredentials, StoreRefused, StoreUnavailable
from tests.support.picture_server import PictureServer, Reply
from tests.support.servers import S3Server
from tests.support.stores import CLIENTS, OWN_NAMES, SECRET

each_client = pytest.mark.parametrize("client", CLIENTS)


def error_body(code: str) -> bytes:
    """The body of an S3 error."""
    return f"<Error><Code>{code}</Code></Error>".encode()


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set credentials that no store accepts."""
    for name, value in OWN_NAMES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def real(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The real store, with credentials that it accepts."""
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


DENIED = Reply(status=403, body=error_body("AccessDenied"))
UNPROVED = {
    "no right to list": ("", "/", DENIED, "accepted", "may not list buckets"),
    "no listing": ("", "/", Reply.error(501), "not proved", "does not list buckets"),
    "no word": ("", "/", Reply.error(403), "not proved", "does not list buckets"),
    "no right to read": ("b", "/b/shiwu-check", DENIED, "was asked", "not proved that objects of b"),
}


@each_client
def test_s3_check_proves_the_credentials(real: S3Server, client: S3Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the client of the worker: the bucket that the operator names, otherwise a list of the buckets."""
    monkeypatch.setenv("SHIWU_S3_CLIENT", client)
    text, warnings = check_s3(Settings())
    assert text.startswith(f"{real.endpoint_url} answers {client}; credentials from env; the credentials were accepted")
    assert not warnings
    monkeypatch.setenv("SHIWU_ALLOW_BUCKETS", "shiwu-*,pictures")
    assert check_s3(Settings()) == (
        f"{real.endpoint_url} answers {client}; credentials from env; bucket pictures answers",
        (),
    )
    monkeypatch.setenv("SHIWU_ALLOW_BUCKETS", "no-such-bucket")
    with pytest.raises(StoreRefused, match="NoSuchBucket"):
        check_s3(Settings())
    for buckets in ("", "pictures"):
        monkeypatch.setenv("SHIWU_ALLOW_BUCKETS", buckets)
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            with monkeypatch.context() as wrong:
                wrong.setenv(name, "wrong")
                with pytest.raises(StoreRefused, match=r"SignatureDoesNotMatch|InvalidAccessKeyId"):
                    check_s3(Settings())
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable):
        check_s3(Settings())


@each_client
@pytest.mark.parametrize("case", UNPROVED.values(), ids=UNPROVED)
def test_s3_check_warns_of_what_it_could_not_prove(
    http_server: PictureServer,
    client: S3Client,
    case: tuple[str, str, Reply, str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Missing permissions are a warning and no error."""
    buckets, path, reply, text, warning = case
    http_server.serve(path, reply)
    monkeypatch.setenv("SHIWU_S3_CLIENT", client)
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", http_server.url(""))
    monkeypatch.setenv("SHIWU_ALLOW_BUCKETS", buckets)
    text_of_check, [warning_text] = check_s3(Settings())
    assert text in text_of_check
    assert warning in warning_text


def test_s3_check_without_credentials_sends_no_request(
    http_server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless SHIWU_S3_ANONYMOUS is set."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", http_server.url(""))
    assert "will be answered source_credentials" in check_s3(Settings())[0]
    with monkeypatch.context() as half:
        half.setenv("AWS_ACCESS_KEY_ID", "key")
        with pytest.raises(NoCredentials):
            check_s3(Settings())
    assert not http_server.hits
    monkeypatch.setenv("SHIWU_S3_ANONYMOUS", "1")
    text, [warning] = check_s3(Settings())
    assert "without credentials (SHIWU_S3_ANONYMOUS)" in text
    assert "not proved" in warning
    assert http_server.hits == {"/shiwu-check/shiwu-check": 1}


@pytest.mark.parametrize(
    "url",
    ["minio:9000", "127.0.0.1:9000", "ftp://h", "http://", "http://[bad", "http://h:x", "http://h:0", "http://h?x"],
)
def test_endpoint_that_is_not_a_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail for every image."""
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", url)
    with pytest.raises(ValidationError, match=r"expected http://host\[:port\]"):
        Settings()


def test_password_in_the_endpoint_is_never_shown(http_server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no effect: credentials come from the AWS configuration."""
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", f"http://key:{SECRET}@[bad")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert SECRET not in str(caught.value)
    http_server.serve("/", DENIED)
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", f"http://key:{SECRET}@{http_server.host}")
    assert check_s3(Settings())[0].startswith(f"http://{http_server.host} answers boto3")
    monkeypatch.setenv("SHIWU_S3_ENDPOINT_URL", "https://h/storage/v1/s3")
    assert Settings().s3_endpoint_url == "https://h/storage/v1/s3"


@pytest.mark.parametrize("region", ["eu west", "a/b", "-eu", "x" * 64])
def test_invalid_region_is_refused(region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region becomes a part of a host name."""
    monkeypatch.setenv("SHIWU_S3_REGION", region)
    with pytest.raises(ValidationError, match="expected the name of a region"):
        Settings()


@pytest.mark.parametrize("text", ["a\r\nX: y", "猫", "x" * 257])
def test_invalid_user_agent_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is shiwu and its version."""
    assert Settings().user_agent_text == f"shiwu/{version('shiwu')}"
    monkeypatch.setenv("SHIWU_USER_AGENT", text)
    with pytest.raises(ValidationError, match="printable ASCII"):
        Settings()
