"""Makes the job's error out of what a source replied or how the fetch failed, as the table of errors says.

An answer does not say whether the worker's rules refused a source or no connection came about, because producers could
otherwise map the network of the worker. `detail` says it, in the log only.
"""

from __future__ import annotations

import re
import traceback
from typing import Final
from urllib.parse import urljoin

import urllib3
from urllib3.util import parse_url

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import JobError, Rejected, Unavailable, Unreachable
from shiwu_worker.stages.fetch.error_table import UNKNOWN, Row, exception_row, http_row

_NO_CONNECTION: Final = (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError)
_FRAMES_TOLD: Final = 3
_CAUSE_CHARS: Final = 200


def job_error(found: Row, message: str, *, detail: str | None = None, retry_after_s: float | None = None) -> JobError:
    """The error of a job that met what this row of the table is about.

    Args:
        detail: what only the log may say.
        retry_after_s: the pause that the source asks for.
    """
    code = found.error_code
    if found.is_final:
        kind = Unreachable if code is ErrorCode.SOURCE_UNAVAILABLE else Rejected
        return kind(code, message, stage=Stage.FETCH, detail=detail)
    return Unavailable(code, message, stage=Stage.FETCH, detail=detail, retry_after_s=retry_after_s)


def rejected(code: ErrorCode, message: str, *, detail: str | None = None) -> Rejected:
    """A fetch that another try would not help."""
    return Rejected(code, message, stage=Stage.FETCH, detail=detail)


def unavailable(message: str, *, detail: str | None = None) -> Unavailable:
    """A fetch that may succeed later."""
    return Unavailable(ErrorCode.SOURCE_UNAVAILABLE, message, stage=Stage.FETCH, detail=detail)


def not_connected(shown: str) -> str:
    """What is told of every source that no connection was made to, for whatever reason."""
    return f"expected a source that can be reached from the worker: {shown}"


def refused(error: Exception, shown: str, *, tells: bool) -> JobError:
    """A source that the rules forbid, or whose name does not exist.

    Args:
        tells: say aloud that the rules forbid it.
    """
    if tells:
        return rejected(ErrorCode.SOURCE_FORBIDDEN, f"refused by the worker's rules: {error}", detail=str(error))
    return job_error(exception_row(error), not_connected(shown), detail=f"refused: {error}")


def bucket_refused(shown: str, *, detail: str, tells: bool = False) -> Rejected:
    """An object that may not be read, by the store's word or by the operator's."""
    why = "refused by the worker's rules" if tells else "expected an object that this worker may read"
    return rejected(ErrorCode.SOURCE_FORBIDDEN, f"{why}: {shown}", detail=detail)


def unknown_error(error: BaseException, shown: str) -> JobError:
    """An error that no row of the table names: the service's own fault, with its cause for the log."""
    text = f"the fetch failed by an error that this worker does not know ({type(error).__name__}): {shown}"
    return job_error(UNKNOWN, text, detail=_cause(error))


def _cause(error: BaseException) -> str:
    """The class, the text and the last places of an error, without what may hold a URL's query or user name."""
    text = str(error)
    if any(sign in text for sign in "?@") or "://" in text:
        text = "(its text holds an address and is left out)"
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_TOLD:]
    placements = " < ".join(
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames[::-1]
    )
    return f"{type(error).__name__}: {text[:_CAUSE_CHARS]} at {placements or 'no placement'}"


def bad_status(status: int, shown: str, *, retry_after_s: float | None = None) -> JobError:
    """What an HTTP status means that brings no image."""
    return job_error(http_row(status), f"HTTP {status}: {shown}", retry_after_s=retry_after_s)


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
    found = exception_row(error)
    if found is UNKNOWN:
        return unknown_error(error, shown)
    if found.code is ErrorCode.INVALID_REFERENCE:
        return job_error(found, f"expected a URL, got {shown}")
    if isinstance(error, _NO_CONNECTION):
        return job_error(found, not_connected(shown), detail=f"{type(error).__name__}: {error.__cause__}")
    if found.code is ErrorCode.SOURCE_FORBIDDEN:
        text = f"expected a certificate that this worker accepts: {shown}"
        return job_error(found, text, detail=str(error.args[0]) if error.args else None)
    return job_error(found, f"the connection failed ({type(error).__name__}): {shown}")
