"""What any client of the object store gets and gives. Where the store is, the configuration says, never a message."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from shiwu.contract import ErrorCode
from shiwu_worker.errors import JobError
from shiwu_worker.sources import rejected, s3_refused, unavailable

S3Client = Literal["boto3", "obstore"]
CHUNK: Final = 64 * 1024
STORES_KEPT: Final = 16
"""Buckets with connections of their own, where a client has such: open files, and a stranger names the buckets."""
# No colon: botocore would take an ARN for the name of a region and an endpoint.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the object store is, None means the usual AWS chain; and what asks it."""

    endpoint_url: str | None
    region: str | None
    client: S3Client = "boto3"


@dataclass(frozen=True, slots=True)
class S3Limits:
    """Bounds of one object's way, and how many objects are read at a time."""

    threads: int
    connect_timeout_s: float
    read_timeout_s: float
    total_timeout_s: float


@dataclass(frozen=True, slots=True)
class Body:
    """An object that is about to be read."""

    read: Callable[[], bytes]
    """The next bytes, as many as have come; none at the end."""
    length: int | None
    """What the store says, in bytes."""


class StoreError(Exception):
    """No object. Its text holds no key, no address and no signature."""


class StoreRefused(StoreError):
    """The store's own answer."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"S3 answered {code} (HTTP {status})")
        self.code = code
        self.status = status


class StoreAway(StoreError):
    """No answer, or half of one."""

    def __init__(self, why: str) -> None:
        super().__init__(f"S3 did not answer ({why})")


class NoCredentials(StoreError):
    """The AWS chain ends without credentials, or with half of them."""

    def __init__(self) -> None:
        super().__init__("expected S3 credentials in the worker's environment, found none")


class WrongName(StoreError):
    """Such a bucket, key or version can't be asked for."""


class ObjectStore(Protocol):
    """One client of the store. Thread-safe, and tries once: tries are the fetcher's, within one deadline."""

    def open(self, bucket: str, key: str, *, version: str | None) -> AbstractContextManager[Body]:
        """Ask for one object; its body is read inside the block, by the same thread.

        Raises:
            StoreError: also while the body is read.
        """
        ...


def is_bucket(name: str) -> bool:
    """Whether this is the name of a bucket, and no ARN, port or user name."""
    return _BUCKET.fullmatch(name) is not None


def s3_error(error: StoreError, shown: str) -> JobError:
    """What it means for the job that there is no object."""
    if isinstance(error, StoreRefused):
        return s3_refused(error.code, error.status, shown)
    if isinstance(error, NoCredentials):
        return rejected(ErrorCode.SOURCE_FORBIDDEN, str(error))
    if isinstance(error, WrongName):
        return rejected(ErrorCode.INVALID_REFERENCE, f"{error}: {shown}")
    return unavailable(str(error))
