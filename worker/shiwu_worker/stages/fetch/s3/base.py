"""What any client of the object store gets and gives. Where the store is, the configuration says, never a message."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Literal, Protocol
from urllib.parse import urlsplit

from shiwu.contract import ErrorCode
from shiwu_worker.errors import JobError
from shiwu_worker.stages.fetch.error_table import NO_CREDENTIALS, NO_REPLY, UNKNOWN, WRONG_REFERENCE, Row, s3_row
from shiwu_worker.stages.fetch.fetch_errors import bucket_refused, job_error

S3Client = Literal["boto3", "obstore"]
CHUNK: Final = 64 * 1024
STORES_KEPT: Final = 16
"""Buckets with connections of their own, where a client has such: open files, and a stranger names the buckets."""
_AWS: Final = (".amazonaws.com", ".amazonaws.com.cn")
# No colon: botocore would take an ARN for the name of a region and an endpoint.
_CODE: Final = re.compile(r"[\w.]{1,64}", re.ASCII)
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the object store is, None means the usual AWS chain; and what asks it."""

    endpoint_url: str | None
    region: str | None
    client: S3Client = "boto3"
    is_anonymous: bool = False
    """Neither credentials nor signatures."""
    requester_pays: bool = False
    user_agent: str = "shiwu"


@dataclass(frozen=True, slots=True)
class S3Limits:
    """Bounds of one object's way, and how many objects are read at a time."""

    threads: int
    connect_timeout_s: float
    read_timeout_s: float
    total_timeout_s: float


@dataclass(frozen=True, slots=True)
class ObjectBody:
    """An object that is about to be read."""

    read: Callable[[], bytes]
    """The next bytes, as many as have come; none at the end."""
    length: int | None
    """What the store says, in bytes."""


class StoreError(Exception):
    """No object. Its text holds no key, no address and no signature."""

    def __init__(self, text: str, found: Row) -> None:
        super().__init__(text)
        self.row = found
        """What it means for the job."""


class StoreRefused(StoreError):
    """The store's own reply.

    Args:
        code: S3's code; what has another form than a code of S3 counts as none.
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
    """No reply, or half of one."""

    def __init__(self, why: str) -> None:
        super().__init__(f"S3 did not answer ({why})", NO_REPLY)


class NoCredentials(StoreError):
    """The AWS chain ends without credentials, or with half of them."""

    def __init__(self) -> None:
        super().__init__("expected S3 credentials in the worker's environment, found none", NO_CREDENTIALS)


class WrongSettings(StoreError):
    """The worker's settings or credentials of S3 cannot work, whatever is asked for."""

    def __init__(self, why: str) -> None:
        super().__init__(f"expected S3 settings and credentials that work ({why})", NO_CREDENTIALS)
        self.why = why


class WrongName(StoreError):
    """Such a bucket, key or version cannot be asked for."""

    def __init__(self, text: str) -> None:
        super().__init__(text, WRONG_REFERENCE)


class StoreDefect(StoreError):
    """The client of the store failed in a way that no row of the table names."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the S3 client failed ({why})", UNKNOWN)


class ObjectStore(Protocol):
    """One client of the store. Thread-safe, and tries once: tries are the fetcher's, within one deadline."""

    def open(self, bucket: str, key: str, *, version: str | None) -> AbstractContextManager[ObjectBody]:
        """Ask for one object; its body is read inside the block, by the same thread.

        Raises:
            StoreError: also while the body is read.
        """
        ...


def is_aws(url: str) -> bool:
    """Whether an endpoint is one of AWS, and not a store of the operator's own."""
    return _aws_ending(url) is not None


def is_at(url: str, endpoint: str) -> bool:
    """Whether a request goes to this endpoint. The hosts of one AWS partition, of all regions and buckets, are one."""
    asked, own = urlsplit(url), urlsplit(endpoint)
    if asked.scheme != own.scheme:
        return False
    if is_aws(endpoint):
        return _aws_ending(url) == _aws_ending(endpoint)
    usual_port = 443 if own.scheme == "https" else 80
    return (asked.hostname, asked.port or usual_port) == (own.hostname, own.port or usual_port)


def _aws_ending(url: str) -> str | None:
    host = (urlsplit(url).hostname or "").lower()
    return next((ending for ending in _AWS if host.endswith(ending)), None)


def is_bucket(name: str) -> bool:
    """Whether this is the name of a bucket, and no ARN, port or user name."""
    return _BUCKET.fullmatch(name) is not None


def s3_error(error: StoreError, shown: str) -> JobError:
    """What it means for the job that there is no object."""
    if error.row.code is ErrorCode.SOURCE_FORBIDDEN:
        return bucket_refused(shown, detail=f"{error}: {shown}")
    detail = None if error.row.log_level == "info" else f"{error}: {shown}"
    if isinstance(error, StoreRefused):
        return job_error(error.row, f"{error}: {shown}", detail=detail, retry_after_s=error.retry_after_s)
    if isinstance(error, WrongName):
        return job_error(error.row, f"{error}: {shown}")
    return job_error(error.row, str(error), detail=detail)
