"""The object store by boto3."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

from shiwu.contract import ErrorCode
from shiwu.network.http_replies import FinalReply, retry_after_s
from shiwu_worker.errors import JobError
from shiwu_worker.policy.access_rules import is_special_bucket
from shiwu_worker.policy.limits import S3Options
from shiwu_worker.stages.fetch.error_table import UNKNOWN, exception_row
from shiwu_worker.stages.fetch.http_replies import NO_BODY, is_whole
from shiwu_worker.stages.fetch.s3.base import (
    CHUNK,
    NoCredentials,
    NotModified,
    ObjectBody,
    S3Limits,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    WrongName,
    WrongSettings,
    is_at,
    is_aws,
    virtual_url,
)

CHAIN_RETRY_PAUSE_S: Final = 2.0
"""Pause after a failure of the AWS chain: it calls services, and each thread would wait for them."""
CHAIN_TIMEOUT_S: Final = 3.0
"""Connect and read time-out of services that issue credentials. botocore would wait for minutes, so the time limit of
fetch and decode would reject the image."""
_OPERATIONS: Final = frozenset({"GetObject", "HeadBucket", "ListBuckets", "CreateSession"})
"""Operations of the store itself; any other operation belongs to a service that issues credentials."""


_requested: Final = threading.local()
"""`bucket`: the one that this thread requests; the hook that checks the host gets only the URL."""


class BotoStore:
    """An `ObjectStore`; the first request creates the client."""

    def __init__(self, options: S3Options, limits: S3Limits) -> None:
        self._options = options
        self._clients = ClientCache(options, limits)

    @contextmanager
    def open(self, bucket: str, key: str, *, version: str | None, etag: str | None = None) -> Iterator[ObjectBody]:
        """Request one object."""
        options = {} if version is None else {"VersionId": version}
        if etag is not None:
            options["IfNoneMatch"] = etag
        if self._options.requester_pays:
            options["RequestPayer"] = "requester"
        _requested.bucket = bucket
        with as_store_errors(has_version=version is not None):
            answer = _get(self._clients.get().client, Bucket=bucket, Key=key, **options)
            with answer["Body"] as body:
                _check_whole(answer)
                # read1 and not read: the latter would wait until a chunk is complete, however slowly it arrives.
                yield ObjectBody(lambda: body.read1(CHUNK), answer.get("ContentLength"), answer.get("ETag"))


def _get(client: Any, **parameters: str) -> Any:
    try:
        return client.get_object(**parameters)
    except UnicodeError:
        raise
    except ClientError as error:
        metadata: Mapping[str, Any] = error.response
        status = metadata.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if "IfNoneMatch" in parameters and status == HTTPStatus.NOT_MODIFIED:
            raise NotModified from error
        raise
    except ValueError as error:  # botocore could not read a header of the reply: a date, a length
        raise StoreUnavailable(f"malformed reply, {type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class S3Access:
    """What a request needs."""

    session: botocore.session.Session
    client: Any
    credentials: ReadOnlyCredentials | None
    """None to send requests without a signature."""


def _check_whole(answer: Mapping[str, Any]) -> None:
    status = int(answer["ResponseMetadata"]["HTTPStatusCode"])
    if status < 200:
        raise StoreRefused("", status)
    if status in NO_BODY or not is_whole(status, answer.get("ContentRange")):
        raise StoreUnavailable(f"HTTP {status} without the whole object")


class ClientCache:
    """Creates the client when the AWS chain has credentials, and keeps these fresh. Thread-safe.

    A client created without credentials would never get any, so it is not kept.
    """

    def __init__(self, options: S3Options, limits: S3Limits) -> None:
        self._options = options
        self._limits = limits
        self._client: tuple[botocore.session.Session, Any] | None = None
        self._failed: tuple[float, Callable[[], StoreError]] | None = None
        """Until when the AWS chain is not called, and the error to raise until then."""
        self._lock = threading.Lock()

    def get(self) -> S3Access:
        """The client and the current credentials.

        Raises:
            NoCredentials: when the chain has none now.
            WrongSettings: when no client can be created, or the chain fails.
        """
        with self._lock:
            self._check_failed()
            if self._client is None:
                self._client = self._make()
            inner, client = self._client
        self._check_failed()
        # Here and not in the request: a failure of a service that issues credentials is no fact about the object.
        return S3Access(inner, client, self._credentials(inner))

    def _make(self) -> tuple[botocore.session.Session, Any]:
        inner = botocore.session.Session()
        # For clients of services that issue credentials; the client of the store has its own configuration.
        inner.set_default_client_config(
            Config(
                connect_timeout=CHAIN_TIMEOUT_S,
                read_timeout=CHAIN_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": 1},
            )
        )
        self._credentials(inner)
        session = boto3.session.Session(botocore_session=inner)
        return inner, new_client(session, self._options, self._limits)

    def _check_failed(self) -> None:
        failed = self._failed
        if failed is not None and time.monotonic() < failed[0]:
            raise failed[1]()

    def _credentials(self, session: botocore.session.Session) -> ReadOnlyCredentials | None:
        if self._options.is_anonymous:
            return None
        try:
            return _credentials(session)
        except WrongSettings as error:
            self._failed = time.monotonic() + CHAIN_RETRY_PAUSE_S, partial(WrongSettings, error.why)
            raise
        except NoCredentials:
            self._failed = time.monotonic() + CHAIN_RETRY_PAUSE_S, NoCredentials
            raise


def _credentials(session: botocore.session.Session) -> ReadOnlyCredentials:
    try:
        found = session.get_credentials()
        if found is None:
            raise NoCredentials
        return found.get_frozen_credentials()
    except StoreError:
        raise
    except PartialCredentialsError as error:
        raise NoCredentials from error
    except ClientError as error:
        raise _by_other_service(error) from error
    except Exception as error:  # border: the chain runs programs and calls services, none of which concerns the object
        raise WrongSettings(type(error).__name__) from error


def _by_other_service(error: ClientError) -> WrongSettings:
    response: Mapping[str, Any] = error.response
    return WrongSettings(f"{error.operation_name} answered {response.get('Error', {}).get('Code', 'no code'):.64}")


def new_client(session: boto3.session.Session, options: S3Options, limits: S3Limits) -> Any:
    """A boto3 client that never retries by itself. Thread-safe.

    Raises:
        WrongSettings: when the endpoint is no URL.
    """
    try:
        client = session.client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=options.region,
            config=Config(
                # The fetcher retries within one deadline; botocore's retries would be added to these.
                retries={"mode": "standard", "total_max_attempts": 1},
                user_agent=options.user_agent,
                signature_version=UNSIGNED if options.is_anonymous else None,
                max_pool_connections=limits.threads,
                connect_timeout=limits.connect_timeout_s,
                read_timeout=limits.read_timeout_s,
                tcp_keepalive=True,
                s3=_addressing(options),
                # Stores other than AWS fail on the newer checksums.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except ValueError as error:
        raise WrongSettings("the endpoint is no http(s)://host[:port]") from error
    _skip_interim_replies(client)
    endpoint = client.meta.endpoint_url
    if not is_aws(endpoint):
        client.meta.events.register("before-parameter-build.s3", _follow_no_redirect)
    check = partial(_check_host, endpoint, options.addressing == "virtual")
    client.meta.events.register_first("before-send.s3", check)
    return client


def _addressing(options: S3Options) -> Any:
    """Where requests name the bucket. botocore uses the path where the bucket is no part of a host name."""
    if options.addressing != "auto":
        return {"addressing_style": options.addressing}
    return {"addressing_style": "path"} if options.endpoint_url else {}


def _check_host(endpoint: str, is_virtual: bool, request: Any, **_: object) -> None:
    """Reject a request that would leave the endpoint: some bucket names make botocore choose another one."""
    bucket: str = getattr(_requested, "bucket", "")
    # To a name of S3 Express, botocore would send the session's token first.
    has_bucket = is_virtual and not is_special_bucket(bucket) and is_at(request.url, virtual_url(endpoint, bucket))
    if not is_at(request.url, endpoint) and not has_bucket:
        raise WrongName("expected a bucket of the configured endpoint, got a name that chooses another one")


class _Plain(AWSHTTPConnection):
    response_class = FinalReply  # type: ignore[assignment]  # the stubs have botocore's own class


class _Tls(AWSHTTPSConnection):
    response_class = FinalReply  # type: ignore[assignment]  # the stubs have botocore's own class


class _PlainPool(AWSHTTPConnectionPool):
    ConnectionCls = _Plain


class _TlsPool(AWSHTTPSConnectionPool):
    ConnectionCls = _Tls


def _skip_interim_replies(client: Any) -> None:
    """Let the connections of the client skip 1xx replies, which botocore would take for an empty object."""
    session = client._endpoint.http_session
    session._pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    session._manager.pool_classes_by_scheme = session._pool_classes_by_scheme


def _follow_no_redirect(context: dict[str, Any], **_: object) -> None:
    # A bucket of AWS may be in another region. Any other store has one endpoint, which botocore would ask for the
    # region of the bucket dozens of times.
    context.setdefault("s3_redirect", {})["redirected"] = True


@contextmanager
def as_store_errors(*, has_version: bool = False) -> Iterator[None]:
    """Turn errors of botocore into store errors. Errors that the error table does not have are raised as they are.

    Args:
        has_version: the object is requested by version.
    """
    try:
        yield
    except (StoreError, JobError, NotModified):
        raise
    except ClientError as error:
        raise _refused(error, has_version=has_version) from error
    except Exception as error:  # botocore lets errors of urllib3 and the socket pass; unknown ones are raised again
        if (known := _known_error(error)) is None:
            raise
        raise known from error


def _refused(error: ClientError, *, has_version: bool) -> StoreError:
    response: Mapping[str, Any] = error.response
    code = str(response.get("Error", {}).get("Code", ""))
    if error.operation_name not in _OPERATIONS:
        return _by_other_service(error)
    metadata: Mapping[str, Any] = response.get("ResponseMetadata", {})
    headers = {"Retry-After": metadata.get("HTTPHeaders", {}).get("retry-after", "")}
    headers["Date"] = metadata.get("HTTPHeaders", {}).get("date", "")
    pause_s = retry_after_s(headers)
    return StoreRefused(code, int(metadata.get("HTTPStatusCode", 0)), has_version=has_version, retry_after_s=pause_s)


def _known_error(error: Exception) -> StoreError | None:
    found = exception_row(error)
    if found is UNKNOWN:
        return None
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return NoCredentials()
    if found.code is ErrorCode.SOURCE_CREDENTIALS:
        return WrongSettings(type(error).__name__)
    if found.code is ErrorCode.INVALID_REFERENCE:
        return WrongName("expected a bucket and key that S3 accepts")
    return StoreUnavailable(type(error).__name__)
