"""What a source's refusals mean: facts that no other try changes, or absences that may pass."""

from __future__ import annotations

from typing import Final
from urllib.parse import urljoin, urlsplit

import urllib3
from botocore.exceptions import ClientError

from shiwu.contract import ErrorCode, Stage, without_query
from shiwu_worker.errors import JobError, Rejected, Unavailable

_NOT_FOUND: Final = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "MethodNotAllowed"}
_FORBIDDEN: Final = {
    "AccessDenied",
    "403",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AllAccessDisabled",
    "401",
}


def rejected(code: ErrorCode, message: str) -> Rejected:
    """A fetch that another try would not help."""
    return Rejected(code, message, stage=Stage.FETCH)


def unavailable(message: str) -> Unavailable:
    """A fetch that may succeed later."""
    return Unavailable(ErrorCode.SOURCE_UNAVAILABLE, message, stage=Stage.FETCH)


def s3_error(error: ClientError, reference: str) -> JobError:
    """What an S3 store's refusal means for the job."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    text = f"S3 answered {code} (HTTP {status}): {without_query(reference)}"
    if code in _NOT_FOUND or status == 404:
        return rejected(ErrorCode.SOURCE_NOT_FOUND, text)
    if code in _FORBIDDEN or status in {401, 403}:
        return rejected(ErrorCode.SOURCE_FORBIDDEN, text)
    if status >= 500 or code in {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"} or status == 429:
        return unavailable(text)
    return rejected(ErrorCode.SOURCE_NOT_FOUND, text)


def check_hop(url: str) -> None:
    """Refuse an address, the first or one that a redirect names, that is no plain http(s) one."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, "expected a redirect to http(s)://host without user name")


def next_hop(url: str, to: str) -> str:
    """Where a redirect leads; never from https to anything else."""
    target = urljoin(url, to)
    if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, "expected no redirect from https to another scheme")
    return target


def http_error(error: Exception, url: str) -> JobError:
    """What a failed HTTP exchange means for the job."""
    shown = without_query(url)
    if isinstance(error, urllib3.exceptions.LocationParseError | UnicodeError):
        return rejected(ErrorCode.INVALID_REFERENCE, f"expected a URL, got {shown}")
    if isinstance(error, urllib3.exceptions.SSLError):
        return rejected(ErrorCode.SOURCE_FORBIDDEN, f"the server's certificate was not accepted: {shown}")
    return unavailable(f"{type(error).__name__}: {shown}")
