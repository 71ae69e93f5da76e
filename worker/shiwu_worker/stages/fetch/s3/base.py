"""The interface of an object store, and its errors. The configuration says where the store is, never a message."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

from shiwu.contract import ErrorCode
from shiwu_worker.errors import JobError
from shiwu_worker.stages.fetch.error_table import NO_CREDENTIALS, NO_REPLY, UNKNOWN, WRONG_REFERENCE, Row, s3_row
from shiwu_worker.stages.fetch.fetch_errors import bucket_refused, job_error

CHUNK: Final = 64 * 1024
MAX_BUCKET_CLIENTS: Final = 16
"""Buckets with their own connections, which are open files; producers name the buckets, so the number is limited."""
_AWS: Final = (".amazonaws.com", ".amazonaws.com.cn")
# No colon: botocore would take an ARN for the name of a region and an endpoint.
_CODE: Final = re.compile(r"[\w.]{1,64}", re.ASCII)
_LABEL: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
"""A bucket that botocore, too, writes before the host name."""
_IPV4: Final = re.compile(r"[0-9.]+")


@dataclass(frozen=True, slots=True)
class S3Limits:
    """Time limits of one read, and how many objects are read at a time."""

    threads: int
    connect_timeout_s: float
    read_timeout_s: float
    total_timeout_s: float


@dataclass(frozen=True, slots=True)
class ObjectBody:
    """An object that is about to be read."""

    read: Callable[[], bytes]
    """Returns the next bytes, as many as have arrived; empty at the end."""
    length: int | None
    """The announced length in bytes."""
    etag: str | None = None


class NotModified(Exception):
    """The object is still the one with the ETag that was sent."""


class StoreError(Exception):
    """The object could not be read. The text has no key, no address and no signature."""

    def __init__(self, text: str, found: Row) -> None:
        super().__init__(text)
        self.row = found
        """The row of the error table, which decides what happens to the job."""


class StoreRefused(StoreError):
    """The store replied with an error.

    Args:
        code: the error code of S3; a text of another form counts as none.
        retry_after_s: the pause that the store asks for.
    """

    def __init__(
        self, code: str, status: int, *, has_version: bool = False, retry_after_s: float | None = None
    ) -> None:
        code = code.strip()
        self.code = code if _CODE.fullmatch(code) else str(status)
        self.status = status
        self.retry_after_s = retry_after_s
        found = s3_row(self.code, status, has_version=has_version)
        super().__init__(f"S3 answered {self.code} (HTTP {status})", found)


class StoreUnavailable(StoreError):
    """The store gave no reply, or half of one."""

    def __init__(self, why: str) -> None:
        super().__init__(f"S3 did not answer ({why})", NO_REPLY)


class NoCredentials(StoreError):
    """The AWS chain ends without credentials, or with incomplete ones."""

    def __init__(self) -> None:
        super().__init__("expected S3 credentials in the worker's environment, found none", NO_CREDENTIALS)


class WrongSettings(StoreError):
    """The S3 settings or credentials of the worker cannot work for any object."""

    def __init__(self, why: str) -> None:
        super().__init__(f"expected S3 settings and credentials that work ({why})", NO_CREDENTIALS)
        self.why = why


class WrongName(StoreError):
    """The bucket, key or version cannot be requested."""

    def __init__(self, text: str) -> None:
        super().__init__(text, WRONG_REFERENCE)


class StoreDefect(StoreError):
    """The client of the store failed in a way that no row of the table names."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the S3 client failed ({why})", UNKNOWN)


class ObjectStore(Protocol):
    """A client of the store. Thread-safe; tries once, because the fetcher retries within one deadline."""

    def open(
        self, bucket: str, key: str, *, version: str | None, etag: str | None = None
    ) -> AbstractContextManager[ObjectBody]:
        """Request one object. The same thread reads its body, inside the block.

        Raises:
            NotModified: the object still has this ETag.
            StoreError: when the request fails, or reading the body.
        """
        ...


def is_aws(url: str) -> bool:
    """Whether an endpoint belongs to AWS, and is not a store of the operator."""
    return _aws_ending(url) is not None


def is_at(url: str, endpoint: str) -> bool:
    """Whether a request goes to this endpoint. All hosts of one AWS partition count as one endpoint."""
    target, own = urlsplit(url), urlsplit(endpoint)
    if target.scheme != own.scheme:
        return False
    if is_aws(endpoint):
        return _aws_ending(url) == _aws_ending(endpoint)
    usual_port = 443 if own.scheme == "https" else 80
    return (target.hostname, target.port or usual_port) == (own.hostname, own.port or usual_port)


def virtual_url(endpoint: str, bucket: str) -> str:
    """The endpoint with the bucket in its host name; unchanged where that would be no host name."""
    host = urlsplit(endpoint).hostname or ""
    if _LABEL.fullmatch(bucket) is None or ":" in host or _IPV4.fullmatch(host):
        return endpoint
    scheme, _, rest = endpoint.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}://{login}{at}{bucket}.{place}"


def _aws_ending(url: str) -> str | None:
    host = (urlsplit(url).hostname or "").lower()
    return next((ending for ending in _AWS if host.endswith(ending)), None)


def s3_error(error: StoreError, shown: str) -> JobError:
    """The error of a job whose object could not be read."""
    if error.row.code is ErrorCode.SOURCE_FORBIDDEN:
        return bucket_refused(shown, detail=f"{error}: {shown}")
    detail = None if error.row.log_level == "info" else f"{error}: {shown}"
    if isinstance(error, StoreRefused):
        return job_error(error.row, f"{error}: {shown}", detail=detail, retry_after_s=error.retry_after_s)
    if isinstance(error, WrongName):
        return job_error(error.row, f"{error}: {shown}")
    return job_error(error.row, str(error), detail=detail)
