"""s3://, https://, http:// or file:// → bytes, with a size limit and one deadline for everything.

Errors say whether trying again may help: `Rejected` for what can't be, `Unavailable` for what can't be now. A few quick
tries happen here; slow ones are the pipeline's, through Redis.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from shiwu.contract import ErrorCode, without_query
from shiwu_worker.errors import AddressRefused, Unavailable
from shiwu_worker.sources import check_hop, http_error, next_hop, rejected, s3_error, unavailable

CHUNK: Final = 64 * 1024
QUICK_TRIES: Final = 3
REDIRECTS: Final = 3


class Pool(Protocol):
    """The part of urllib3.PoolManager that is used here."""

    def request(self, method: str, url: str, **options: Any) -> urllib3.BaseHTTPResponse:
        """Send one request without redirects or retries."""
        ...


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the object store is; None means the usual AWS chain."""

    endpoint_url: str | None
    region: str | None


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch."""

    max_bytes: int
    total_timeout_s: float
    connect_timeout_s: float
    read_timeout_s: float


class Fetcher:
    """Fetches references. Thread-safe; one for each loader process.

    Args:
        pool: HTTP connections, guarded against addresses that are not public.
        folders: what file:// may read, resolved; empty allows nothing.
        threads: how many fetches run at a time.
    """

    def __init__(
        self, *, s3: S3Options, pool: Pool, folders: tuple[Path, ...], limits: FetchLimits, threads: int
    ) -> None:
        self._s3_options = s3
        self._pool = pool
        self._folders = tuple(folder.resolve() for folder in folders)
        self._limits = limits
        self._threads = threads
        self._s3_client: Any = None
        self._s3_lock = threading.Lock()

    def fetch(self, reference: str) -> bytes:
        """Read the whole object within the total deadline.

        Raises:
            Rejected: it is not there, not allowed, a folder, or larger than the limit.
            Unavailable: the source did not answer in time or answered that it can't now.
        """
        deadline_s = time.monotonic() + self._limits.total_timeout_s
        scheme = urlsplit(reference).scheme
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
            except Unavailable:
                pause_s = random.uniform(0.05, 0.15) * 2**tried  # noqa: S311 jitter, no secret
                if tried == QUICK_TRIES or time.monotonic() + pause_s >= deadline_s:
                    raise
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    # -------------------------------------------------------------------------------- s3
    def _from_s3(self, reference: str, deadline_s: float) -> bytes:
        parts = urlsplit(reference)
        # Keys are taken as they stand: '?' begins the version only as '?versionId='.
        key, _, query = reference.removeprefix(f"s3://{parts.netloc}/").partition("?versionId=")
        if key.endswith("/"):
            raise rejected(ErrorCode.SOURCE_NOT_A_FILE, f"expected a key, got a prefix: {without_query(reference)}")
        version = {"VersionId": parse_qs(f"v={query}")["v"][0]} if query else {}
        try:
            answer = self._s3().get_object(Bucket=parts.netloc, Key=key, **version)
            with answer["Body"] as body:
                return self._read(lambda: body.read(CHUNK), answer.get("ContentLength"), deadline_s)
        except ClientError as error:
            raise s3_error(error, reference) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise rejected(
                ErrorCode.SOURCE_FORBIDDEN, "expected S3 credentials in the worker's environment, found none"
            ) from error
        except ParamValidationError as error:
            text = f"expected a bucket and key that S3 accepts: {without_query(reference)}"
            raise rejected(ErrorCode.INVALID_REFERENCE, text) from error
        except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            raise unavailable(f"S3 did not answer ({type(error).__name__})") from error

    def _s3(self) -> Any:
        with self._s3_lock:
            if self._s3_client is None:
                self._s3_client = boto3.session.Session().client(
                    "s3",
                    endpoint_url=self._s3_options.endpoint_url,
                    region_name=self._s3_options.region,
                    config=Config(
                        # Tries are ours, within one deadline; botocore's would come on top of them.
                        retries={"mode": "standard", "total_max_attempts": 1},
                        max_pool_connections=self._threads,
                        connect_timeout=self._limits.connect_timeout_s,
                        read_timeout=self._limits.read_timeout_s,
                        tcp_keepalive=True,
                        s3={"addressing_style": "path"} if self._s3_options.endpoint_url else {},
                        # Stores other than AWS fail on the newer checksums.
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                    ),
                )
            return self._s3_client

    # -------------------------------------------------------------------------------- http
    def _from_http(self, url: str, deadline_s: float) -> bytes:
        for _ in range(REDIRECTS + 1):
            check_hop(url)
            try:
                answer = self._pool.request(
                    "GET",
                    url,
                    preload_content=False,
                    decode_content=False,
                    redirect=False,
                    retries=False,
                    timeout=urllib3.Timeout(
                        connect=self._limits.connect_timeout_s,
                        read=min(self._limits.read_timeout_s, max(0.01, deadline_s - time.monotonic())),
                    ),
                    headers={"Accept-Encoding": "identity", "User-Agent": "shiwu", "Accept": "image/*"},
                )
            except AddressRefused as error:
                raise rejected(ErrorCode.SOURCE_FORBIDDEN, "the source is not reachable from here") from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise http_error(error, url) from error
            try:
                if answer.status in {301, 302, 303, 307, 308} and (to := answer.headers.get("Location")):
                    url = next_hop(url, to)
                    continue
                return self._read_http(answer, url, deadline_s)
            finally:
                # A body that was read to its end leaves the connection usable; any other is dropped.
                answer.release_conn() if answer.closed else answer.close()
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, f"expected at most {REDIRECTS} redirects")

    def _read_http(self, answer: urllib3.BaseHTTPResponse, url: str, deadline_s: float) -> bytes:
        shown = without_query(url)
        if answer.status in {404, 410}:
            raise rejected(ErrorCode.SOURCE_NOT_FOUND, f"HTTP {answer.status}: {shown}")
        if answer.status in {401, 403, 407, 451}:
            raise rejected(ErrorCode.SOURCE_FORBIDDEN, f"HTTP {answer.status}: {shown}")
        if answer.status in {408, 425, 429} or answer.status >= 500:
            raise unavailable(f"HTTP {answer.status}: {shown}")
        if answer.status != 200:
            raise rejected(ErrorCode.SOURCE_NOT_FOUND, f"expected HTTP 200, got {answer.status}: {shown}")
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise rejected(ErrorCode.NOT_A_PICTURE, f"expected an unencoded body, got Content-Encoding {encoding:.40}")
        length = answer.headers.get("Content-Length", "")
        try:
            return self._read(lambda: answer.read1(CHUNK), int(length) if length.isdecimal() else None, deadline_s)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise http_error(error, url) from error

    # -------------------------------------------------------------------------------- file
    def _from_folder(self, reference: str, deadline_s: float) -> bytes:
        path = Path(unquote(urlsplit(reference).path))
        try:
            real = path.resolve(strict=True)
            if not any(real.is_relative_to(folder) for folder in self._folders):
                raise rejected(ErrorCode.SOURCE_FORBIDDEN, "expected a file in one of SHIWU_ALLOW_FOLDERS")
            if real.is_dir():
                raise rejected(ErrorCode.SOURCE_NOT_A_FILE, f"expected a file, got a folder: {path}")
            if not real.is_file():
                raise rejected(ErrorCode.SOURCE_NOT_A_FILE, f"expected a regular file: {path}")
            with real.open("rb") as file:
                return self._read(lambda: file.read(CHUNK), real.stat().st_size, deadline_s)
        except (FileNotFoundError, NotADirectoryError) as error:
            # Outside the allowed folders nobody learns what exists.
            inside = any(path.parent.resolve().is_relative_to(folder) for folder in self._folders)
            code = ErrorCode.SOURCE_NOT_FOUND if inside else ErrorCode.SOURCE_FORBIDDEN
            raise rejected(
                code, "no such file" if inside else "expected a file in one of SHIWU_ALLOW_FOLDERS"
            ) from error
        except (PermissionError, RuntimeError) as error:
            raise rejected(ErrorCode.SOURCE_FORBIDDEN, f"can't read the file ({type(error).__name__})") from error
        except OSError as error:
            if error.errno in {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}:
                raise rejected(ErrorCode.INVALID_REFERENCE, f"can't be a file ({error.strerror})") from error
            raise unavailable(f"can't read the file ({type(error).__name__})") from error

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
