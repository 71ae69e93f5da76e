"""Interprets HTTP replies: whole or partial, compressed or not, which pause they ask for.

Also skips interim replies (1xx). Python does that for 100 Continue only, and without a limit.
"""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

MAX_INTERIM_REPLIES: Final = 16
"""Interim replies before one reply; a busy server sends fewer within the deadline of a fetch."""
SWITCHING_PROTOCOLS: Final = 101
"""The one 1xx status that is final. No request asks for it."""

WHOLE: Final = frozenset({200, 203})
"""Statuses whose body is the whole file; 203 means that a proxy changed something."""
NO_BODY: Final = frozenset({204, 205})
PARTIAL: Final = 206
MAX_DIGITS: Final = 18
"""Digits of a number in a header that are read; a longer number stays too large for any limit."""
_RANGE: Final = re.compile(r"bytes 0-(\d{1,18})/(\d{1,18})")


def is_whole(status: int, content_range: str | None) -> bool:
    """Whether the body of a reply is the whole file; status 206 counts if its range is the whole file."""
    if status != PARTIAL:
        return status in WHOLE
    found = _RANGE.fullmatch((content_range or "").strip())
    return found is not None and int(found[1]) + 1 == int(found[2])


_COMPRESSION_MAGIC: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"})
"""Values of Content-Encoding that mean compressed bytes; all others (utf-8, aws-chunked, none) are ignored."""
_IMAGES: Final = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|.{4}ftyp|\xff\x0a|.{4}JXL ", re.DOTALL
)


def compression_of(data: bytes, content_encoding: str | None) -> str | None:
    """How the bytes are compressed, or None. The bytes decide; if they do not tell, the header does."""
    for magic, name in _COMPRESSION_MAGIC.items():
        if data.startswith(magic):
            return name
    codings = (part.strip().lower() for part in (content_encoding or "").split(","))
    coding = next((part for part in codings if part in _CODINGS), None)
    return None if coding is None or _IMAGES.match(data) else coding


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
