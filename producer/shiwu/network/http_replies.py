"""Reads HTTP replies: skips interim ones (1xx), and finds the pause that a reply asks for.

Python skips 100 Continue only, and without a limit.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

MAX_INTERIM_REPLIES: Final = 16
"""Interim replies before one reply; a busy server sends fewer within the deadline of a request."""
SWITCHING_PROTOCOLS: Final = 101
"""The one 1xx status that is final. No request asks for it."""
MAX_DIGITS: Final = 18
"""Digits of a number in a header that are read; a longer number stays too large for any limit."""


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The pause in seconds that a reply asks for; None for none, or for an unknown form.

    A date is compared with the server's own clock if the reply has a Date header, otherwise with this machine's.
    """
    text = (headers.get("Retry-After") or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:MAX_DIGITS])
    until_s = _timestamp_s(text)
    if until_s is None:
        return None
    now_s = _timestamp_s(headers.get("Date") or "")
    return max(0.0, until_s - (time.time() if now_s is None else now_s))


def _timestamp_s(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


class FinalReply(http.client.HTTPResponse):
    """A reply that skips interim replies; their bytes count towards the limit of header bytes."""

    _interim_left = MAX_INTERIM_REPLIES

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # not in typeshed
            if not 100 <= status < 200 or status == SWITCHING_PROTOCOLS:
                return version, status, reason
            self._interim_left -= 1
            if self._interim_left < 0:
                raise http.client.BadStatusLine(f"more than {MAX_INTERIM_REPLIES} interim replies")
            http.client.parse_headers(self.fp)
