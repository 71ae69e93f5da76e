"""Reads past interim replies (1xx) of HTTP servers. Python does that for 100 Continue only, and without a bound."""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

MAX_INTERIM: Final = 16
"""Interim replies before one reply; more than a server that is busy sends within a fetch's deadline."""
SWITCHING_PROTOCOLS: Final = 101
"""The one status of 1xx after which no other comes. No request asks for it."""

WHOLE: Final = frozenset({200, 203})
"""Statuses whose body is the whole file; 203 says that a proxy on the way changed something."""
NO_BODY: Final = frozenset({204, 205})
PARTIAL: Final = 206
MAX_DIGITS: Final = 18
"""Of numbers in headers: more are cut off, and the rest is beyond all measure anyway."""
_RANGE: Final = re.compile(r"bytes 0-(\d{1,18})/(\d{1,18})")


def is_whole(status: int, content_range: str | None) -> bool:
    """Whether a reply of this status has the whole file as its body; 206 where its range is all of it."""
    if status != PARTIAL:
        return status in WHOLE
    found = _RANGE.fullmatch((content_range or "").strip())
    return found is not None and int(found[1]) + 1 == int(found[2])


_MAGIC: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz"})
"""Values of Content-Encoding that mean packed bytes; all others (utf-8, aws-chunked, none) mean nothing."""
_IMAGES: Final = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|.{4}ftyp|\xff\x0a|.{4}JXL ", re.DOTALL
)


def packed_by(data: bytes, content_encoding: str | None) -> str | None:
    """How the bytes are packed, None where they are plain. The bytes decide; what they leave open, the header says."""
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    told = (part.strip().lower() for part in (content_encoding or "").split(","))
    coding = next((part for part in told if part in _CODINGS), None)
    return None if coding is None or _IMAGES.match(data) else coding


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The pause that a reply asks for in seconds, None where it asks for none or in a form that is not known.

    A moment is compared with the server's own clock where the reply tells it.
    """
    told = (headers.get("Retry-After") or "").strip()
    if told.isascii() and told.isdigit():
        return float(told[:MAX_DIGITS])
    until_s = _moment_s(told)
    if until_s is None:
        return None
    now_s = _moment_s(headers.get("Date") or "")
    return max(0.0, until_s - (time.time() if now_s is None else now_s))


def _moment_s(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


class FinalReply(http.client.HTTPResponse):
    """A reply whose status is the final one; its interim replies count against the limit of all header bytes."""

    _interim_left = MAX_INTERIM

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # not in typeshed
            if not 100 <= status < 200 or status == SWITCHING_PROTOCOLS:
                return version, status, reason
            self._interim_left -= 1
            if self._interim_left < 0:
                raise http.client.BadStatusLine(f"more than {MAX_INTERIM} interim replies")
            http.client.parse_headers(self.fp)
