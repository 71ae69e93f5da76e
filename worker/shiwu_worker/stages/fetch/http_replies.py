"""Interprets HTTP replies to a fetch: whole or partial, compressed or not."""

from __future__ import annotations

import re
from typing import Final

WHOLE: Final = frozenset({200, 203})
"""Statuses whose body is the whole file; 203 means that a proxy changed something."""
NO_BODY: Final = frozenset({204, 205})
PARTIAL: Final = 206
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
