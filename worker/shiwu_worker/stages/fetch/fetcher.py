"""s3://, https://, http:// or file:// → bytes, with a size limit and one deadline for everything.

Errors tell whether another try may help: `Rejected` if not, `Unavailable` if later. A few quick retries happen here;
the pipeline does slow ones through Redis.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, Protocol

import urllib3
from urllib3.util import parse_url

from shiwu.contract import ErrorCode, scheme_of, split_s3, without_query
from shiwu.network.address_guard import AddressRefused, UnknownHost
from shiwu.network.http_replies import MAX_DIGITS, retry_after_s
from shiwu_worker.errors import JobError, Unavailable
from shiwu_worker.policy.access_rules import AccessRules, allows_bucket
from shiwu_worker.policy.limits import FetchLimits, S3Options
from shiwu_worker.stages.fetch.error_table import file_row
from shiwu_worker.stages.fetch.fetch_errors import (
    bad_status,
    bucket_refused,
    check_url,
    http_error,
    job_error,
    next_hop,
    refused,
    rejected,
    unavailable,
    unknown_error,
)
from shiwu_worker.stages.fetch.http_replies import compression_of, is_whole
from shiwu_worker.stages.fetch.local_files import LocalFiles
from shiwu_worker.stages.fetch.s3.base import CHUNK, NotModified, S3Limits, StoreError, s3_error
from shiwu_worker.stages.fetch.s3.factory import new_store
from shiwu_worker.stages.fetch.source_pauses import SourcePauses
from shiwu_worker.stages.fetch.validators import OWN_STORE, FetchedFile, Validator, place_of, validator_of

MAX_QUICK_TRIES: Final = 3
NOT_MODIFIED: Final = 304


class Transport(Protocol):
    """The part of `shiwu.network.http_client.HttpClient` that the fetcher uses."""

    def open(self, url: str, *, deadline_s: float, etag: str | None = None) -> urllib3.BaseHTTPResponse:
        """Send one GET without redirects or retries, with If-None-Match if there is an ETag."""
        ...


class Fetcher:
    """Fetches references. Thread-safe; one for each loader process.

    Args:
        http_client: HTTP connections, guarded against addresses that are not public.
        access: the operator's rules for buckets and folders; the HTTP client has those for addresses.
        threads: how many fetches run at a time.
    """

    def __init__(
        self, *, s3: S3Options, http_client: Transport, access: AccessRules, limits: FetchLimits, threads: int
    ) -> None:
        self._http_client = http_client
        self._access = access
        self._files = LocalFiles(access.allow_folders, access.deny_folders)
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
        """Read the whole object within the total deadline; raises as `fetch_if_changed`."""
        file = self.fetch_if_changed(reference, None)
        if file is None:
            raise AssertionError("unreachable: without a validator no file is unchanged")
        return file.data

    def fetch_if_changed(self, reference: str, validator: Validator | None) -> FetchedFile | None:
        """Read the whole object within the total deadline; None if its source says that it is the one known before.

        The source is asked in any case, with all checks.

        Args:
            validator: what an earlier fetch of the same reference gave.

        Raises:
            Rejected: when it does not exist, is not allowed, is a folder, or is larger than the limit.
            Unreachable: when the rules forbid it, or there is no such host.
            Unavailable: when the source did not answer in time, or answered that it cannot now.
        """
        deadline_s = time.monotonic() + self._limits.total_timeout_s
        scheme = scheme_of(reference)
        sources: dict[str, Callable[[str, float, Validator | None], FetchedFile | None]] = {
            "s3": self._from_s3,
            "https": self._from_http,
            "http": self._from_http,
            "file": self._from_file,
        }
        source = sources.get(scheme)
        if source is None:
            raise rejected(ErrorCode.INVALID_REFERENCE, f"expected s3, https, http or file, got {scheme!r}")
        for attempt in range(1, MAX_QUICK_TRIES + 1):
            began_s = time.monotonic()
            try:
                return source(reference, deadline_s, validator)
            except Unavailable as error:
                pause_s = random.uniform(0.05, 0.15) * 2**attempt  # noqa: S311 jitter, no secret
                is_quick = error.code is ErrorCode.SOURCE_UNAVAILABLE and error.retry_after_s is None
                # A slow source would keep this thread as long again.
                is_quick = is_quick and time.monotonic() - began_s < self._limits.min_rate_after_s
                if not is_quick or attempt == MAX_QUICK_TRIES or time.monotonic() + pause_s >= deadline_s:
                    raise
                time.sleep(pause_s)  # in a loader thread; loaders are killed and need not react to a stop
            except JobError:
                raise
            except Exception as error:  # border: an unknown error is a fault of the worker, not of the image
                raise unknown_error(error, without_query(reference)) from error
        raise AssertionError("unreachable")

    # -------------------------------------------------------------------------------- s3
    def _from_s3(self, reference: str, deadline_s: float, validator: Validator | None) -> FetchedFile | None:
        try:
            parts = split_s3(reference)
        except ValueError as error:
            raise rejected(ErrorCode.INVALID_REFERENCE, f"expected {error}") from error
        shown = without_query(reference)
        if not allows_bucket(self._access, parts.bucket):
            is_reason_given = self._access.tells_refusals
            raise bucket_refused(
                shown, detail="refused: SHIWU_ALLOW_BUCKETS, SHIWU_DENY_BUCKETS", is_reason_given=is_reason_given
            )
        if parts.key.endswith("/"):
            raise rejected(ErrorCode.SOURCE_NOT_A_FILE, f"expected a key, got a prefix: {shown}")
        source = f"s3://{parts.bucket}"
        self._pauses.check(source)
        etag = validator.etag_for(OWN_STORE) if validator is not None else None
        try:
            with self._store.open(parts.bucket, parts.key, version=parts.version, etag=etag) as body:
                data = _uncompressed(self._read(body.read, body.length, deadline_s), shown)
                return FetchedFile(data, validator_of(body.etag, OWN_STORE))
        except NotModified:
            return None
        except StoreError as error:
            raise self._note_pause(source, s3_error(error, shown)) from error

    def _note_pause(self, source: str, error: JobError) -> JobError:
        if isinstance(error, Unavailable):
            self._pauses.note(source, error)
        return error

    # -------------------------------------------------------------------------------- http
    def _from_http(self, reference: str, deadline_s: float, validator: Validator | None) -> FetchedFile | None:
        url, shown = reference, without_query(reference)
        check_url(url, shown)
        for _ in range(self._limits.max_redirects + 1):
            place = place_of(url)
            etag = validator.etag_for(place) if validator is not None else None
            reply = self._request(url, shown, deadline_s, etag)
            try:
                if reply.status == NOT_MODIFIED and etag is not None:
                    reply.drain_conn()
                    return None
                if reply.status in {301, 302, 303, 307, 308} and (location := reply.headers.get("Location")):
                    url = next_hop(url, location)
                    continue
                if not is_whole(reply.status, reply.headers.get("Content-Range")):
                    pause_s = retry_after_s(reply.headers)
                    raise self._note_pause(_host(url), bad_status(reply.status, shown, retry_after_s=pause_s))
                data = self._read_http(reply, shown, deadline_s)
                return FetchedFile(data, validator_of(reply.headers.get("ETag"), place))
            finally:
                # After a body that was read to its end the connection can be used again; otherwise it is closed.
                reply.release_conn() if reply.closed else reply.close()
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, f"expected at most {self._limits.max_redirects} redirects")

    def _request(self, url: str, shown: str, deadline_s: float, etag: str | None) -> urllib3.BaseHTTPResponse:
        self._pauses.check(_host(url))
        try:
            return self._http_client.open(url, deadline_s=deadline_s, etag=etag)
        except AddressRefused as error:
            raise refused(error, shown, is_reason_given=self._access.tells_refusals) from error
        except UnknownHost as error:
            raise refused(error, shown, is_reason_given=False) from error
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise http_error(error, shown) from error

    def _read_http(self, reply: urllib3.BaseHTTPResponse, shown: str, deadline_s: float) -> bytes:
        try:
            data = self._read(lambda: reply.read1(CHUNK), _content_length(reply), deadline_s)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise http_error(error, shown) from error
        return _uncompressed(data, shown, content_encoding=reply.headers.get("Content-Encoding"))

    # -------------------------------------------------------------------------------- file
    def _from_file(self, reference: str, deadline_s: float, _: Validator | None) -> FetchedFile:
        try:
            with self._files.open(reference) as (file, size):
                return FetchedFile(_uncompressed(self._read(lambda: file.read(CHUNK), size, deadline_s), reference))
        except OSError as error:
            raise job_error(
                file_row(error),
                f"expected a file that the worker can read, got {type(error).__name__} ({error.strerror})",
            ) from error

    def _read(self, read_chunk: Callable[[], bytes], length: int | None, deadline_s: float) -> bytes:
        """Read to the end, but not more than the limit, not past the deadline, and not slower than the least rate."""
        limit, began_s = self._limits.max_bytes, time.monotonic()
        if length is not None and length > limit:
            raise rejected(
                ErrorCode.PICTURE_TOO_LARGE, f"expected at most {limit} bytes (SHIWU_MAX_BYTES), got {length}"
            )
        parts: list[bytes] = []
        total = 0
        while part := read_chunk():
            total += len(part)
            if total > limit:
                raise rejected(
                    ErrorCode.PICTURE_TOO_LARGE, f"expected at most {limit} bytes (SHIWU_MAX_BYTES), got more"
                )
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise unavailable(f"expected all bytes within {self._limits.total_timeout_s:g} s, got {total} so far")
            self._check_rate(total, now_s - began_s)
            parts.append(part)
        if length is not None and total < length:
            raise unavailable(f"expected {length} bytes, got {total}: the connection ended early")
        return b"".join(parts)

    def _check_rate(self, total: int, seconds: float) -> None:
        least = self._limits.min_bytes_per_s
        if seconds >= self._limits.min_rate_after_s and total < least * seconds:
            raise unavailable(f"expected at least {least} bytes/s on average, got {total} bytes in {seconds:.1f} s")


def _host(url: str) -> str:
    parts = parse_url(url)
    return f"{parts.host}:{parts.port or parts.scheme}"


def _uncompressed(data: bytes, shown: str, *, content_encoding: str | None = None) -> bytes:
    """The bytes, if they are not compressed: this process has the credentials, so it decompresses nothing.

    Raises:
        Rejected: not_a_picture, with the name of the compression.
    """
    if compression := compression_of(data, content_encoding):
        text = f"expected the plain bytes of an image, got bytes compressed with {compression}"
        raise rejected(ErrorCode.NOT_A_PICTURE, f"{text}; store or serve it uncompressed: {shown}")
    return data


def _content_length(reply: urllib3.BaseHTTPResponse) -> int | None:
    """The announced length in bytes; a number of too many digits is cut and stays too large."""
    text = reply.headers.get("Content-Length", "")
    return int(text[:MAX_DIGITS]) if text.isascii() and text.isdigit() else None
