"""What a file's first bytes and markers tell before a decoder is let near it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8"
_SCAN: Final = b"\xff\xda"
_STANDALONE: Final = {0x01, *range(0xD0, 0xD9)}
_END_OF_IMAGE: Final = 0xD9
_START_OF_SCAN: Final = 0xDA
_FRAMES: Final = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = {0xC2, 0xC6, 0xCA, 0xCE}
_NEXT_MARKER: Final = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
"""In a scan's data 0xff is followed by 0, or by a restart marker."""


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP's canvas, or None where this is no WebP.

    Pillow allocates a WebP's canvas twice when it opens the file, before anybody could look at its size.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def has_more_chunks(data: bytes, limit: int) -> bool:
    """Whether a PNG has more chunks than this, or a JPEG more segments before its pixels.

    Pillow reads each of them in Python: a file of a million empty ones keeps every thread of a process waiting.
    """
    if data.startswith(_PNG):
        chunks, at = 0, len(_PNG)
        while chunks <= limit and at + 8 <= len(data):
            at += 12 + int.from_bytes(data[at : at + 4], "big")
            chunks += 1
        return chunks > limit
    return data.startswith(_JPEG) and sum(1 for _ in islice(_segments(data), limit + 1)) > limit


def has_more_scans(data: bytes, limit: int) -> bool:
    """Whether a JPEG has more scans than this. Each costs a pass over the whole picture, however short it is."""
    components = 0
    for marker, at in _segments(data):
        if marker in _FRAMES:
            components = 0 if marker in _PROGRESSIVE else data[at + 7 : at + 8][0] if at + 7 < len(data) else 0
        # One scan with all there is: a decoder takes no other.
        if marker == _START_OF_SCAN and components and data[at + 2 : at + 3] == bytes([components]):
            return False
    # A scan can't begin without these two bytes; looking for them is quick.
    if data.count(_SCAN) <= limit:
        return False
    scans, at = 0, 2
    while scans <= limit and (found := _NEXT_MARKER.search(data, at)):
        marker, at = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            return False
        if marker in _STANDALONE:
            continue
        scans += marker == _START_OF_SCAN
        at += int.from_bytes(data[at : at + 2], "big")
    return scans > limit


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of the length of each segment up to the first scan's; ends where it can't go on."""
    at = 2
    while at + 3 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        yield marker, at + 2
        if marker == _START_OF_SCAN:
            return
        at += 2 + (0 if marker in _STANDALONE else int.from_bytes(data[at + 2 : at + 4], "big"))
