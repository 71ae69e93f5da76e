"""Reads the segments of a JPEG: its frame header, the begin and end of the data of each scan, and its EXIF data."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from shiwu_worker.stages.decode.image_errors import broken, too_large, unsupported

_START_OF_IMAGE: Final = b"\xff\xd8"
_SOS: Final = 0xDA
_EOI: Final = 0xD9
_DRI: Final = 0xDD
_APP1: Final = 0xE1
_APP2: Final = 0xE2
_STANDALONE: Final = {0x01, *range(0xD0, 0xD9)}
_FRAMES: Final = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = {0xC2, 0xCA}
_ARITHMETIC: Final = {0xC9, 0xCA}
_READABLE: Final = {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA}
"""Baseline, extended, progressive and lossless with Huffman codes; extended and progressive with arithmetic codes."""
MAX_PADDING: Final = 256
"""Most bytes of padding between two segments or at the end of a scan; more are damage."""
_ENDS_SCAN: Final = np.array([byte not in {0, *range(0xD0, 0xD8), 0xFF} for byte in range(256)])
"""Which bytes after 0xff end the data of a scan: all but stuffed zeros, restart markers and fill bytes."""
_FIRST_BLOCK_BYTES: Final = 1 << 18
_MAX_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The segments before the data of the first scan."""

    frame: bytes
    """The segment with the size and the components, with its marker."""
    first_scan: bytes
    """The segment that starts the first scan, with its marker."""
    data_at: int
    """Where the first scan's data begins."""
    kind: int
    """The second byte of the frame's marker."""
    has_restarts: bool
    """Whether restart markers divide the scans."""
    exif: bytes
    has_more_images: bool
    """Whether the file declares that other images follow this one."""

    @property
    def components(self) -> frozenset[int]:
        """The ids of the colour components."""
        return frozenset(self.frame[10 + 3 * number] for number in range(self.frame[9]))

    @property
    def is_one_scan(self) -> bool:
        """Whether the first scan is the whole image."""
        return self.kind not in _PROGRESSIVE and self.first_scan[4] == self.frame[9]

    @property
    def is_arithmetic(self) -> bool:
        """Whether the scans are arithmetic-coded; libjpeg then cannot wait for more data."""
        return self.kind in _ARITHMETIC

    @property
    def plain(self) -> bytes:
        """A header without metadata, for Pillow's parser."""
        return _START_OF_IMAGE + self.frame + self.first_scan


def read_header(data: bytes, *, max_segments: int) -> JpegHeader:
    """Read the segments up to the first scan; those with metadata may be damaged.

    Raises:
        Rejected: picture_broken without a frame and a scan, picture_unsupported for 12 bits and rare variants,
            picture_too_large with more than `max_segments`, because libjpeg and this loop visit each of them.
    """
    frame = exif = b""
    has_restarts = has_more_images = False
    for number, (marker, begin, end) in enumerate(_segments(data, 2)):
        if number >= max_segments:
            raise too_large(f"expected a JPEG of at most {max_segments} segments before its pixels, got more")
        if marker in _FRAMES:
            frame = b"\xff" + data[begin - 1 : end]
        elif marker == _DRI:
            has_restarts = data[begin + 2 : begin + 4] != b"\0\0"
        elif marker == _APP1 and not exif and data[begin + 2 : begin + 8] == b"Exif\0\0":
            exif = data[begin + 2 : end]
        elif marker == _APP2 and data[begin + 2 : begin + 6] == b"MPF\0":
            has_more_images = True
        elif marker == _SOS and frame:
            _check_frame(frame)
            scan = b"\xff" + data[begin - 1 : end]
            if len(scan) < 5 or end > len(data):
                break
            return JpegHeader(frame, scan, end, frame[1], has_restarts, exif, has_more_images)
    raise broken("expected a whole JPEG image, got one that ends before its pixels")


def _check_frame(frame: bytes) -> None:
    if len(frame) < 10 or len(frame) < 10 + 3 * frame[9]:
        raise broken("expected a whole JPEG image, got one with a damaged frame header")
    if frame[1] not in _READABLE:
        raise unsupported("expected a baseline or progressive JPEG, got a hierarchical one: convert it to PNG or JPEG")
    if frame[4] != 8:
        raise unsupported(f"expected a JPEG of 8 bits a sample, got {frame[4]} bits: convert it to PNG or JPEG")
    if frame[9] not in {1, 3, 4}:
        raise unsupported(f"expected a JPEG of 1, 3 or 4 components, got {frame[9]}: convert it to PNG or JPEG")


def _segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Marker, position of its length, and end of each segment up to the next scan or the end of the image."""
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        begin = end = at + 2
        # A zero after 0xff is no marker; libjpeg skips it between segments.
        if marker and marker not in _STANDALONE and marker != _EOI:
            end = begin + int.from_bytes(data[begin : begin + 2], "big")
        yield marker, begin, end
        if marker in (_SOS, _EOI):
            return
        at = end


class Markers:
    """Finds the positions at which the data of a scan may end."""

    def __init__(self, data: bytes) -> None:
        self._bytes = np.frombuffer(data, np.uint8)
        self._positions: list[int] = []
        self._searched = 0
        """All positions between the last call and this one are known."""
        self._block_bytes = _FIRST_BLOCK_BYTES

    def first_from(self, at: int) -> int | None:
        """The first such position from `at` on. Each call must ask for a later position than the one before."""
        self._searched = max(self._searched, at)
        while True:
            number = bisect_left(self._positions, at)
            if number < len(self._positions):
                return self._positions[number]
            if self._searched + 1 >= len(self._bytes):
                return None
            block = self._bytes[self._searched : self._searched + self._block_bytes + 1]
            positions = np.flatnonzero(block[:-1] == 0xFF)
            self._positions = (self._searched + positions[_ENDS_SCAN.take(block.take(positions + 1))]).tolist()
            self._searched += len(block) - 1
            self._block_bytes = min(2 * self._block_bytes, _MAX_BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Scan:
    """The data of one scan."""

    data_at: int
    end: int
    has_marker: bool
    """Whether a marker ends it; otherwise the file ends."""
    has_restarts: bool


def read_scans(data: bytes, header: JpegHeader, *, max_scans: int, max_segments: int) -> list[Scan]:
    """All scans of an image that has several.

    Raises:
        Rejected: picture_too_large with more than `max_scans`, because each costs a pass over the image, or with more
            than `max_segments` between them. picture_broken if a colour has no scan.
    """
    markers = Markers(data)
    scans: list[Scan] = []
    at, has_restarts, seen, segments = header.data_at, header.has_restarts, _first_components(header.first_scan), 0
    while at >= 0:
        marker_at = markers.first_from(at)
        end = len(data) if marker_at is None else marker_at
        scans.append(Scan(at, end, marker_at is not None, has_restarts))
        at, is_ended, last_end = -1, marker_at is None, end
        for marker, begin, segment_end in _segments(data, end):
            segments += 1
            if begin - 2 - last_end > MAX_PADDING:
                break
            last_end = segment_end
            is_ended |= marker == _EOI
            if marker == _DRI:
                has_restarts = data[begin + 2 : begin + 4] != b"\0\0"
            elif marker == _SOS and segment_end <= len(data):
                at = segment_end
                seen |= _first_components(b"\xff" + data[begin - 1 : segment_end])
            if segments > max_segments:
                raise too_large(f"expected a JPEG of at most {max_segments} segments between its scans, got more")
        if at < 0 and not is_ended:
            raise broken("expected a whole JPEG image, got one that ends between two scans")
        if at >= 0 and len(scans) == max_scans:
            raise too_large(f"expected a JPEG of at most {max_scans} scans (SHIWU_MAX_SCANS), got more")
    if missing := header.components - seen:
        raise broken(f"expected a whole JPEG image, got one without the data of {len(missing)} of its components")
    return scans


def _first_components(scan: bytes) -> set[int]:
    """The components of which this scan has the first coefficient; without it a component is not visible."""
    count = scan[4] if len(scan) > 4 else 0
    if len(scan) < 8 + 2 * count or scan[5 + 2 * count] != 0:
        return set()
    return {scan[5 + 2 * number] for number in range(count)}
