"""Turns replies of sources and failures of fetches into errors of jobs, by the error table.

An answer does not tell whether the worker's rules refused a source or no connection was possible. Otherwise producers
could map the network of the worker. `detail` tells it, in the log only.
"""

from __future__ import annotations

import re
import traceback
from typing import Final
from urllib.parse import urljoin

import urllib3
from urllib3.util import parse_url

from shiwu.contract import ErrorCode, Stage, url_error
from shiwu.network.address_guard import UnknownHost
from shiwu_worker.errors import JobError, Rejected, Unavailable, Unreachable
from shiwu_worker.stages.fetch.error_table import UNKNOWN, Row, exception_row, http_row

_NO_CONNECTION: Final = (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError)
_MAX_FRAMES: Final = 3
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f\\]")
_MAX_CAUSE_CHARS: Final = 200


def job_error(found: Row, message: str, *, detail: str | None = None, retry_after_s: float | None = None) -> JobError:
    """The error of a job to which this row of the table applies.

    Args:
        detail: text for the log only.
        retry_after_s: the pause that the source asks for.
    """
    code = found.error_code
    if found.is_final:
        kind = Unreachable if code is ErrorCode.SOURCE_UNAVAILABLE else Rejected
        return kind(code, message, stage=Stage.FETCH, detail=detail)
    return Unavailable(code, message, stage=Stage.FETCH, detail=detail, retry_after_s=retry_after_s)


def rejected(code: ErrorCode, message: str, *, detail: str | None = None) -> Rejected:
    """An error of a fetch that another try would not help."""
    return Rejected(code, message, stage=Stage.FETCH, detail=detail)


def unavailable(message: str, *, detail: str | None = None) -> Unavailable:
    """An error of a fetch that may succeed later."""
    return Unavailable(ErrorCode.SOURCE_UNAVAILABLE, message, stage=Stage.FETCH, detail=detail)


def not_connected(shown: str) -> str:
    """The one text for every source without a connection, whatever the reason."""
    return f"expected a source that can be reached from the worker: {shown}"


def refused(error: Exception, shown: str, *, is_reason_given: bool) -> JobError:
    """The error for a source that the rules forbid, or whose name does not exist.

    Args:
        is_reason_given: the answer may tell that the rules forbid it.
    """
    if is_reason_given:
        return rejected(ErrorCode.SOURCE_FORBIDDEN, f"refused by the worker's rules: {error}", detail=str(error))
    return job_error(exception_row(error), not_connected(shown), detail=f"refused: {error}")


def bucket_refused(shown: str, *, detail: str, is_reason_given: bool = False) -> Rejected:
    """The error for an object that the store or the operator does not let the worker read."""
    why = "refused by the worker's rules" if is_reason_given else "expected an object that this worker may read"
    return rejected(ErrorCode.SOURCE_FORBIDDEN, f"{why}: {shown}", detail=detail)


def unknown_error(error: BaseException, shown: str) -> JobError:
    """The error for an exception that no row of the table names: a fault of the service, with its cause for the log."""
    text = f"the fetch failed by an error that this worker does not know ({type(error).__name__}): {shown}"
    return job_error(UNKNOWN, text, detail=_cause(error))


def _cause(error: BaseException) -> str:
    """The class, the text and the last lines of code of an error, without text that may have a URL's query or user."""
    text = str(error)
    if any(character in text for character in "?@") or "://" in text:
        text = "(its text has an address and is omitted)"
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    lines = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames[::-1])
    return f"{type(error).__name__}: {text[:_MAX_CAUSE_CHARS]} at {lines or 'an unknown line'}"


def bad_status(status: int, shown: str, *, retry_after_s: float | None = None) -> JobError:
    """The error for an HTTP status that comes without an image."""
    return job_error(http_row(status), f"HTTP {status}: {shown}", retry_after_s=retry_after_s)


def check_url(url: str, shown: str) -> None:
    """Refuse a producer's URL that is not plain http(s), or whose host cannot exist.

    Raises:
        Rejected: invalid_reference; producers refuse it by the same rule.
        Unreachable: no name has these letters, as for any unknown host.
    """
    if error := url_error(url):
        raise rejected(ErrorCode.INVALID_REFERENCE, error)
    if not _has_possible_host(url):
        raise refused(UnknownHost("no name has these letters"), shown, is_reason_given=False)


def next_hop(url: str, to: str) -> str:
    """The target of a redirect; never from https to another scheme.

    Raises:
        Rejected: source_forbidden.
    """
    # Headers are read as Latin-1; other bytes than ASCII are UTF-8 that the sender should have escaped.
    to = "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in to.strip(" \t").encode("latin-1", "replace"))
    try:
        target = urljoin(url, to)
    except ValueError:
        target = ""
    # The target itself too: the join removes control characters without an error.
    if _UNSAFE.search(to) or url_error(target) or not _has_possible_host(target):
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, "expected a redirect to a plain http(s)://host/path")
    if parse_url(url).scheme == "https" and parse_url(target).scheme != "https":
        raise rejected(ErrorCode.SOURCE_FORBIDDEN, "expected no redirect from https to another scheme")
    return target


def _has_possible_host(url: str) -> bool:
    """Whether the host of a plain URL can be looked up: letters other than ASCII must have a form in ASCII."""
    try:
        return bool(parse_url(url).host)
    except (ValueError, urllib3.exceptions.HTTPError):
        return False


def http_error(error: Exception, shown: str) -> JobError:
    """The error of a job whose HTTP exchange failed.

    Args:
        shown: the producer's own reference; the target of a redirect is not shown.
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
