"""What a source's refusals mean: facts that no other try changes, or absences that may pass.

What a producer is told does not say whether the worker's rules refused a source, or no connection came about: whoever
may ask could otherwise map the network that the worker stands in. `detail` says it, to the log only.
"""

from __future__ import annotations

import re
import ssl
from typing import Final
from urllib.parse import urljoin

import urllib3
from urllib3.util import parse_url

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import JobError, Rejected, Unavailable, Unreachable

_NOT_FOUND: Final = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "MethodNotAllowed"}
_FORBIDDEN: Final = {
    "AccessDenied",
    "403",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AllAccessDisabled",
    "401",
}
_NO_CONNECTION: Final = (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError)


def rejected(code: ErrorCode, message: str, *, detail: str | None = None) -> Rejected:
    """A fetch that another try would not help."""
    return Rejected(code, message, stage=Stage.FETCH, detail=detail)


def unavailable(message: str, *, detail: str | None = None) -> Unavailable:
    """A fetch that may succeed later."""
    return Unavailable(ErrorCode.SOURCE_UNAVAILABLE, message, stage=Stage.FETCH, detail=detail)


def not_connected(shown: str) -> str:
    """What is told of every source that no connection was made to, for whatever reason."""
    return f"expected a source that can be reached from the worker: {shown}"


def refused(error: Exception, shown: str, *, tells: bool) -> Rejected:
    """A source that the rules forbid, or whose name does not exist.

    Args:
        tells: say aloud that the rules forbid it.
    """
    if tells:
        return rejected(ErrorCode.SOURCE_FORBIDDEN, f"refused by the worker's rules: {error}", detail=str(error))
    code = ErrorCode.SOURCE_UNAVAILABLE
    return Unreachable(code, not_connected(shown), stage=Stage.FETCH, detail=f"refused: {error}")


def bucket_refused(shown: str, *, detail: str, tells: bool = False) -> Rejected:
    """An object that may not be read, by the store's word or by the operator's."""
    why = "refused by the worker's rules" if tells else "expected an object that this worker may read"
    return rejected(ErrorCode.SOURCE_FORBIDDEN, f"{why}: {shown}", detail=detail)


def s3_refused(code: str, status: int, shown: str) -> JobError:
    """What an S3 store's refusal means for the job.

    Args:
        code: S3's own word for it.
    """
    text = f"S3 answered {code} (HTTP {status}): {shown}"
    if code in _NOT_FOUND or status == 404:
        return rejected(ErrorCode.SOURCE_NOT_FOUND, text)
    if code in _FORBIDDEN or status in {401, 403}:
        return bucket_refused(shown, detail=text)
    if status >= 500 or code in {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"} or status == 429:
        return unavailable(text)
    return rejected(ErrorCode.SOURCE_NOT_FOUND, text)


def check_hop(url: str) -> None:
    """Refuse a producer's address that is no plain http(s) one.

    Raises:
        Rejected: invalid_reference.
    """
    if problem := _problem(url):
        raise rejected(ErrorCode.INVALID_REFERENCE, f"expected http(s)://host/path, {problem}")


def next_hop(url: str, to: str) -> str:
    """Where a redirect leads; never from https to anything else.

    Raises:
        Rejected: source_forbidden.
    """
    # Headers are read as Latin-1; what is not ASCII in them is UTF-8 that its sender should have escaped.
    to = "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in to.strip(" \t").encode("latin-1", "replace"))
    try:
        # Before the join, which drops control characters in silence.
        problem = _odd_sign(to)
        target = urljoin(url, to)
    except ValueError:
        target, problem = "", "no URL"
    if problem := problem or _problem(target):
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, f"expected a redirect to http(s)://host/path, {problem}")
    if parse_url(url).scheme == "https" and parse_url(target).scheme != "https":
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, "expected no redirect from https to another scheme")
    return target


def _odd_sign(url: str) -> str | None:
    is_odd = any(sign in " \\" or not sign.isprintable() for sign in url)
    return "got white space, a control character or a backslash" if is_odd else None


def _problem(url: str) -> str | None:
    if problem := _odd_sign(url):
        return problem
    try:
        parts = parse_url(url)
    except (ValueError, urllib3.exceptions.HTTPError):
        return "got something else"
    if parts.scheme not in {"http", "https"} or not parts.host:
        return "got another scheme or no host"
    if parts.auth is not None:
        return "got a user name"
    # A zone, or letters behind an escape, which only attackers write. Sought in the text, for parsing undoes escapes.
    is_escaped = "%" in re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
    return "got an odd host or port" if is_escaped or parts.port == 0 else None


def http_error(error: Exception, shown: str) -> JobError:
    """What a failed HTTP exchange means for the job.

    Args:
        shown: the producer's own reference: where a redirect led is not told.
    """
    if isinstance(error, urllib3.exceptions.LocationParseError | UnicodeError):
        return rejected(ErrorCode.INVALID_REFERENCE, f"expected a URL, got {shown}")
    if isinstance(error, _NO_CONNECTION):
        return unavailable(not_connected(shown), detail=f"{type(error).__name__}: {error.__cause__}")
    if isinstance(error, urllib3.exceptions.SSLError) and isinstance(
        error.args[0] if error.args else None, ssl.SSLCertVerificationError
    ):
        text = f"expected a certificate that this worker accepts: {shown}"
        return rejected(ErrorCode.SOURCE_FORBIDDEN, text, detail=str(error.args[0]))
    return unavailable(f"the connection failed ({type(error).__name__}): {shown}")
