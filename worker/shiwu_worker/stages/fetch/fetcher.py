"""s3://, https://, http:// or file:// → bytes, with a size limit and one deadline for everything.

Errors say whether trying again may help: `Rejected` for what can't be, `Unavailable` for what can't be now. A few quick
tries happen here; slow ones are the pipeline's, through Redis.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import urllib3
from urllib3.util import parse_url

from shiwu.contract import ErrorCode, scheme_of, split_s3, without_query
from shiwu_worker.errors import AddressRefused, JobError, Unavailable, UnknownHost
from shiwu_worker.policy.access_rules import AccessRules, allows_bucket
from shiwu_worker.stages.fetch.error_table import file_row
from shiwu_worker.stages.fetch.fetch_errors import (
    bad_status,
    bucket_refused,
    check_hop,
    http_error,
    job_error,
    next_hop,
    refused,
    rejected,
    unavailable,
    unknown_error,
)
from shiwu_worker.stages.fetch.http_replies import MAX_DIGITS, is_whole, packed_by, retry_after_s
from shiwu_worker.stages.fetch.local_files import LocalFiles
from shiwu_worker.stages.fetch.s3.base import CHUNK, S3Limits, S3Options, StoreError, is_bucket, s3_error
from shiwu_worker.stages.fetch.s3.factory import new_store
from shiwu_worker.stages.fetch.source_pauses import SourcePauses

QUICK_TRIES: Final = 3


class Web(Protocol):
    """The part of `shiwu_worker.stages.fetch.http.HttpClient` that is used here."""

    def open(self, url: str, *, deadline_s: float) -> urllib3.BaseHTTPResponse:
        """Send one GET without redirects or retries."""
        ...


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch."""

    max_bytes: int
    total_timeout_s: float
    connect_timeout_s: float
    read_timeout_s: float
    longest_pause_s: float = 300.0
    """Longest pause that a source may ask for; longer ones count as this."""
    max_redirects: int = 3


class Fetcher:
    """Fetches references. Thread-safe; one for each loader process.

    Args:
        web: HTTP connections, guarded against addresses that are not public.
        reach: the operator's rules for buckets and folders; those for addresses are the web's.
        threads: how many fetches run at a time.
    """

    def __init__(
        self, *, s3: S3Options, http_client: Web, access: AccessRules, limits: FetchLimits, threads: int
    ) -> None:
        self._http_client = http_client
        self._access = access
        self._folders = LocalFiles(access.allow_folders, access.deny_folders)
        self._limits = limits
        self._pauses = SourcePauses(longest_s=limits.longest_pause_s)
        self._store = new_store(
            s3,
            S3Limits(
                threads=threads,
                connect_timeout_s=limits.connect_timeout_s,
                read_timeout_s=limits.read_timeout_s,
                total_timeout_s=limits.total_timeout_s,
            ),
        )

    def fetch(self, reference: str) -> bytes:
        """Read the whole object within the total deadline.

        Raises:
            Rejected: it is not there, not allowed, a folder, or larger than the limit.
            Unreachable: the rules forbid it, or there is no such host.
            Unavailable: the source did not answer in time or answered that it can't now.
        """
        deadline_s = time.monotonic() + self._limits.total_timeout_s
        scheme = scheme_of(reference)
        sources: dict[str, Callable[[str, float], bytes]] = {
            "s3": self._from_s3,
            "https": self._from_http,
            "http": self._from_http,
            "file": self._from_folder,
        }
        source = sources.get(scheme)
        if source is None:
            raise rejected(ErrorCode.INVALID_REFERENCE, f"expected s3, https, http or file, got {scheme!r}")
        for tried in range(1, QUICK_TRIES + 1):
            try:
                return source(reference, deadline_s)
            except Unavailable as error:
                pause_s = random.uniform(0.05, 0.15) * 2**tried  # noqa: S311 jitter, no secret
                is_quick = error.code is ErrorCode.SOURCE_UNAVAILABLE and error.retry_after_s is None
                if not is_quick or tried == QUICK_TRIES or time.monotonic() + pause_s >= deadline_s:
                    raise
                time.sleep(pause_s)  # a thread of a loader; its process is killed, never asked to stop
            except JobError:
                raise
            except Exception as error:  # boundary: an unknown error is the worker's, not the image's
                raise unknown_error(error, without_query(reference)) from error
        raise AssertionError("unreachable")

    # -------------------------------------------------------------------------------- s3
    def _from_s3(self, reference: str, deadline_s: float) -> bytes:
        try:
            parts = split_s3(reference)
        except ValueError as error:
            raise rejected(ErrorCode.INVALID_REFERENCE, f"expected {error}") from error
        shown = without_query(reference)
        if not is_bucket(parts.bucket):
            raise rejected(ErrorCode.INVALID_REFERENCE, f"expected s3://bucket/key with a bucket's name: {shown}")
        if not allows_bucket(self._access, parts.bucket):
            tells = self._access.tells_refusals
            raise bucket_refused(shown, detail="refused: SHIWU_ALLOW_BUCKETS, SHIWU_DENY_BUCKETS", tells=tells)
        if parts.key.endswith("/"):
            raise rejected(ErrorCode.SOURCE_NOT_A_FILE, f"expected a key, got a prefix: {shown}")
        source = f"s3://{parts.bucket}"
        self._pauses.check(source)
        try:
            with self._store.open(parts.bucket, parts.key, version=parts.version) as body:
                return _plain(self._read(body.read, body.length, deadline_s), shown)
        except StoreError as error:
            raise self._noted(source, s3_error(error, shown)) from error

    def _noted(self, source: str, error: JobError) -> JobError:
        if isinstance(error, Unavailable):
            self._pauses.note(source, error)
        return error

    # -------------------------------------------------------------------------------- http
    def _from_http(self, reference: str, deadline_s: float) -> bytes:
        url, shown = reference, without_query(reference)
        check_hop(url)
        for _ in range(self._limits.max_redirects + 1):
            answer = self._ask(url, shown, deadline_s)
            try:
                if answer.status in {301, 302, 303, 307, 308} and (to := answer.headers.get("Location")):
                    url = next_hop(url, to)
                    continue
                if not is_whole(answer.status, answer.headers.get("Content-Range")):
                    pause_s = retry_after_s(answer.headers)
                    raise self._noted(_host(url), bad_status(answer.status, shown, retry_after_s=pause_s))
                return self._read_http(answer, shown, deadline_s)
            finally:
                # A body that was read to its end leaves the connection usable; any other is dropped.
                answer.release_conn() if answer.closed else answer.close()
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, f"expected at most {self._limits.max_redirects} redirects")

    def _ask(self, url: str, shown: str, deadline_s: float) -> urllib3.BaseHTTPResponse:
        self._pauses.check(_host(url))
        try:
            return self._http_client.open(url, deadline_s=deadline_s)
        except AddressRefused as error:
            raise refused(error, shown, tells=self._access.tells_refusals) from error
        except UnknownHost as error:
            raise refused(error, shown, tells=False) from error
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise http_error(error, shown) from error

    def _read_http(self, answer: urllib3.BaseHTTPResponse, shown: str, deadline_s: float) -> bytes:
        try:
            data = self._read(lambda: answer.read1(CHUNK), _length(answer), deadline_s)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise http_error(error, shown) from error
        return _plain(data, shown, content_encoding=answer.headers.get("Content-Encoding"))

    # -------------------------------------------------------------------------------- file
    def _from_folder(self, reference: str, deadline_s: float) -> bytes:
        try:
            with self._folders.open(reference) as (file, size):
                return _plain(self._read(lambda: file.read(CHUNK), size, deadline_s), reference)
        except OSError as error:
            raise job_error(
                file_row(error), f"can't read the file ({type(error).__name__}, {error.strerror})"
            ) from error

    def _read(self, read_some: Callable[[], bytes], length: int | None, deadline_s: float) -> bytes:
        """Read to the end, but never more than the limit and never past the deadline."""
        limit = self._limits.max_bytes
        if length is not None and length > limit:
            raise rejected(ErrorCode.PICTURE_TOO_LARGE, f"expected at most {limit} bytes, got {length}")
        parts: list[bytes] = []
        total = 0
        while part := read_some():
            total += len(part)
            if total > limit:
                raise rejected(ErrorCode.PICTURE_TOO_LARGE, f"expected at most {limit} bytes, got more")
            if time.monotonic() > deadline_s:
                raise unavailable(f"expected all bytes within {self._limits.total_timeout_s:g} s, got {total} so far")
            parts.append(part)
        if length is not None and total < length:
            raise unavailable(f"expected {length} bytes, got {total}: the connection ended early")
        return b"".join(parts)


def _host(url: str) -> str:
    parts = parse_url(url)
    return f"{parts.host}:{parts.port or parts.scheme}"


def _plain(data: bytes, shown: str, *, content_encoding: str | None = None) -> bytes:
    """The bytes, unless they are packed: this process, which holds the credentials, unpacks nothing.

    Raises:
        Rejected: not_a_picture, with the name of the packing.
    """
    if packing := packed_by(data, content_encoding):
        text = f"expected the plain bytes of an image, got bytes packed with {packing}; store or serve it unpacked"
        raise rejected(ErrorCode.NOT_A_PICTURE, f"{text}: {shown}")
    return data


def _length(answer: urllib3.BaseHTTPResponse) -> int | None:
    """The told length in bytes; a number beyond all measure stays one."""
    told = answer.headers.get("Content-Length", "")
    return int(told[:MAX_DIGITS]) if told.isascii() and told.isdigit() else None
