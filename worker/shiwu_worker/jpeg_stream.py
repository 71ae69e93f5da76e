"""Reads a JPEG's segments, and decodes its scans so that missing image data is noticed.

libjpeg fills what is missing in a scan with grey and says so by a warning that Pillow does not pass on. It does so when
it meets a marker; without one it waits for more data. So each scan's data is given to Pillow's decoder without the
marker that ends it: a decoder that still waits has not seen all of the image.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageFile

from shiwu_worker.image_errors import broken, too_large, unsupported

_START_OF_IMAGE: Final = b"\xff\xd8"
_END_OF_IMAGE: Final = b"\xff\xd9"
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
"""Baseline, extended, progressive and lossless by Huffman's codes; the first and third by arithmetic ones."""
FILLER: Final = b"\xff\0" * 8
"""Follows a scan's data: libjpeg looks up to eight bytes ahead while it decodes the last pixels. Ones, of which no
Huffman code consists, stand in for next to no pixels."""
_ARITHMETIC_FILLER: Final = bytes(64)
"""The same for arithmetic codes, whose encoders leave zeros at the end out."""
LEAST_HOLE, LARGEST_PADDING = 64, 256
"""So many zeros at the end of a scan that no pixel needs are a hole in the file and no padding: a sixteenth of the
scan, between these."""
LONG_RUN, LONG_RUN_PADDING = 512, 8
"""Where so many zeros end a scan they are no padding at all: all but a few bytes of them must be needed."""
_ENDS_SCAN: Final = np.array([byte not in {0, *range(0xD0, 0xD8), 0xFF} for byte in range(256)])
"""Which bytes behind 0xff end a scan's data: not those of stuffed data, of restart markers, and of fill bytes."""
_FIRST_BLOCK_BYTES: Final = 1 << 18
_MAX_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What stands before the first scan's data."""

    frame: bytes
    """The segment with size and components, with its marker."""
    first_scan: bytes
    """The segment that starts the first scan, with its marker."""
    data_at: int
    """Where the first scan's data begins."""
    kind: int
    """The second byte of the frame's marker."""
    restarts: bool
    """Whether scans are divided by restart markers."""
    exif: bytes
    holds_more_images: bool
    """Whether the file says that other images follow this one's end."""

    @property
    def components(self) -> frozenset[int]:
        """The ids of the colour components."""
        return frozenset(self.frame[10 + 3 * number] for number in range(self.frame[9]))

    @property
    def is_one_scan(self) -> bool:
        """Whether the first scan holds all there is."""
        return self.kind not in _PROGRESSIVE and self.first_scan[4] == self.frame[9]

    @property
    def is_arithmetic(self) -> bool:
        """Whether the scans are arithmetic-coded; libjpeg cannot wait for more data then."""
        return self.kind in _ARITHMETIC

    @property
    def plain(self) -> bytes:
        """A header with nothing beside the image in it, for Pillow's parser."""
        return _START_OF_IMAGE + self.frame + self.first_scan


def read_header(data: bytes, *, max_segments: int) -> JpegHeader:
    """Read the segments up to the first scan; those beside the image may be damaged.

    Raises:
        Rejected: picture_broken without a frame and a scan, picture_unsupported for 12 bits and rare variants,
            picture_too_large with more segments than this: libjpeg and this loop visit each of them.
    """
    frame = exif = b""
    restarts = holds_more_images = False
    for number, (marker, begin, end) in enumerate(_segments(data, 2)):
        if number >= max_segments:
            raise too_large(f"expected a JPEG of at most {max_segments} segments before its pixels, got more")
        if marker in _FRAMES:
            frame = b"\xff" + data[begin - 1 : end]
        elif marker == _DRI:
            restarts = data[begin + 2 : begin + 4] != b"\0\0"
        elif marker == _APP1 and not exif and data[begin + 2 : begin + 8] == b"Exif\0\0":
            exif = data[begin + 2 : end]
        elif marker == _APP2 and data[begin + 2 : begin + 6] == b"MPF\0":
            holds_more_images = True
        elif marker == _SOS and frame:
            _check_frame(frame)
            scan = b"\xff" + data[begin - 1 : end]
            if len(scan) < 5 or end > len(data):
                break
            return JpegHeader(frame, scan, end, frame[1], restarts, exif, holds_more_images)
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
    """Marker, place of its length, and end of each segment from here to the next scan's or the image's end."""
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        begin = end = at + 2
        # A zero behind 0xff is no marker: what libjpeg passes over between segments.
        if marker and marker not in _STANDALONE and marker != _EOI:
            end = begin + int.from_bytes(data[begin : begin + 2], "big")
        yield marker, begin, end
        if marker in (_SOS, _EOI):
            return
        at = end


class _Markers:
    """Finds the places at which a scan's data may end."""

    def __init__(self, data: bytes) -> None:
        self._bytes = np.frombuffer(data, np.uint8)
        self._places: list[int] = []
        self._searched = 0
        """Places before this are known, from the last question on."""
        self._block_bytes = _FIRST_BLOCK_BYTES

    def first_from(self, at: int) -> int | None:
        """The first such place from here on. Questions must ask for later and later places."""
        self._searched = max(self._searched, at)
        while True:
            number = bisect_left(self._places, at)
            if number < len(self._places):
                return self._places[number]
            if self._searched + 1 >= len(self._bytes):
                return None
            block = self._bytes[self._searched : self._searched + self._block_bytes + 1]
            places = np.flatnonzero(block[:-1] == 0xFF)
            self._places = (self._searched + places[_ENDS_SCAN.take(block.take(places + 1))]).tolist()
            self._searched += len(block) - 1
            self._block_bytes = min(2 * self._block_bytes, _MAX_BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan's data, from the end of the one before, with the segments that lead to it."""

    data_at: int
    end: int
    has_marker: bool
    """Whether a marker ends it, or the file does."""
    restarts: bool


def read_scans(data: bytes, header: JpegHeader, *, max_scans: int, max_segments: int) -> list[Scan]:
    """All scans of an image that has several.

    Raises:
        Rejected: picture_too_large with more scans than this, each of which costs a pass over the image, or with more
            segments between them. picture_broken where a colour has no scan.
    """
    markers = _Markers(data)
    scans: list[Scan] = []
    at, restarts, seen, segments = header.data_at, header.restarts, _first_components(header.first_scan), 0
    while at >= 0:
        marker_at = markers.first_from(at)
        end = len(data) if marker_at is None else marker_at
        scans.append(Scan(at, end, marker_at is not None, restarts))
        at, is_ended, last_end = -1, marker_at is None, end
        for marker, begin, segment_end in _segments(data, end):
            segments += 1
            if begin - 2 - last_end > LARGEST_PADDING:
                break
            last_end = segment_end
            is_ended |= marker == _EOI
            if marker == _DRI:
                restarts = data[begin + 2 : begin + 4] != b"\0\0"
            elif marker == _SOS and segment_end <= len(data):
                at = segment_end
                seen |= _first_components(b"\xff" + data[begin - 1 : segment_end])
            if segments > max_segments:
                raise too_large(f"expected a JPEG of at most {max_segments} segments between its scans, got more")
        if at < 0 and not is_ended:
            raise broken("expected a whole JPEG image, got one that ends between two scans")
        if at >= 0 and len(scans) == max_scans:
            raise too_large(f"expected a JPEG of at most {max_scans} scans, got more")
    if missing := header.components - seen:
        raise broken(f"expected a whole JPEG image, got one without the data of {len(missing)} of its components")
    return scans


def _first_components(scan: bytes) -> set[int]:
    """The components of which this scan holds the first coefficient, without which nothing is seen of them."""
    count = scan[4] if len(scan) > 4 else 0
    if len(scan) < 8 + 2 * count or scan[5 + 2 * count] != 0:
        return set()
    return {scan[5 + 2 * number] for number in range(count)}


def open_jpeg(header: JpegHeader) -> Image.Image:
    """The image as Pillow knows it from its frame, to be loaded by `load_jpeg`."""
    return Image.open(io.BytesIO(header.plain), formats=("JPEG",))


def load_jpeg(image: Image.Image, data: bytes, header: JpegHeader, scans: list[Scan]) -> None:
    """Decode the pixels.

    Args:
        scans: what `read_scans` found, where the image has several.

    Raises:
        Rejected: picture_broken when image data is missing or cannot be decoded.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    if header.is_one_scan:
        _load_one_scan(image, data, header)
    else:
        _load_scans(image, data, header, scans)
    image.tile = []
    image.readonly = 0
    image.fp = None


class _Decoder:
    """Pillow's decoder of one image, and what it has left of the data that it was given."""

    def __init__(self, image: ImageFile.ImageFile) -> None:
        image.load_prepare()
        name, extents, _, args = image.tile[0]
        self._decoder = Image._getdecoder(image.mode, name, args, image.decoderconfig)
        self._decoder.setimage(image.im, extents)
        self._left = b""

    def give(self, data: bytes | memoryview) -> bool:
        """Decode some more; whether the last row of pixels is out."""
        given = memoryview(b"".join((self._left, data))) if self._left else memoryview(data)
        taken, error = self._decoder.decode(given)
        if taken < 0 and error:
            raise broken("expected a whole JPEG image, got one whose data cannot be decoded")
        self._left = b"" if taken < 0 else bytes(given[taken:])
        return taken < 0

    def waits_for_marker(self, following: bytes) -> bool:
        """Whether the scan is decoded, given one more byte that is not 0xff.

        Between scans libjpeg passes over whatever is no marker. Within one it takes no byte before it can fill its
        buffer, which takes more than one.
        """
        if self._left:
            self.give(following)
            return False
        self.give(following)
        return not self._left

    def close(self) -> None:
        """Free libjpeg's memory."""
        self._decoder.cleanup()


def _load_one_scan(image: ImageFile.ImageFile, data: bytes, header: JpegHeader) -> None:
    """All of the image is in one scan: it is whole when the decoder is done without the marker that ends the scan."""
    is_plain = data.endswith(_END_OF_IMAGE) and not header.holds_more_images
    end = len(data) - 2 if is_plain else _Markers(data).first_from(header.data_at)
    has_marker = end is not None
    end = len(data) if end is None else end
    if end <= header.data_at:
        raise broken("expected a whole JPEG image, got one without image data")
    spare = _spare_zeros(data, header.data_at, end) if has_marker else 1
    is_needed = _decode_scan(image, data, end, header, spare=spare)
    if not is_needed:
        # The decoder was done before the end: it came upon an earlier marker, or padding follows the data.
        marker = _Markers(data).first_from(header.data_at)
        if marker is not None and marker < end - 1:
            spare = _spare_zeros(data, header.data_at, marker)
            is_needed = _decode_scan(image, data, marker, header, spare=spare)
    if not is_needed and spare:
        raise broken("expected a whole JPEG image, got one with a damaged end")


def _spare_zeros(data: bytes, begin: int, end: int) -> int:
    """How many zeros at the end of a scan may not all be spare; 0 where there are not so many."""
    if data.endswith(bytes(LONG_RUN), begin, end):
        return LONG_RUN_PADDING
    count = min(max((end - begin) // 16, LEAST_HOLE), LARGEST_PADDING)
    return count if data.endswith(bytes(count), begin, end) else 0


def _decode_scan(image: ImageFile.ImageFile, data: bytes, end: int, header: JpegHeader, *, spare: int) -> bool:
    """Decode the only scan up to this place; whether the decoder needed its last bytes.

    Args:
        spare: how many these are, at least one.

    Raises:
        Rejected: picture_broken when it would need more.
    """
    view = memoryview(data)
    decoder = _Decoder(image)
    try:
        if header.is_arithmetic:
            is_done = decoder.give(b"".join((view[:end], _ARITHMETIC_FILLER)))
            early = False
        else:
            first = end - max(1, spare)
            is_done = early = decoder.give(view[:first])
            if not is_done:
                is_done = decoder.give(b"".join((view[first:end], FILLER)))
    finally:
        decoder.close()
    if not is_done:
        raise broken("expected a whole JPEG image, got one whose data ends before its last row")
    return not early


def _load_scans(image: ImageFile.ImageFile, data: bytes, header: JpegHeader, scans: list[Scan]) -> None:
    """Each scan must be whole. What is refined by later scans that are missing is seen, with less detail."""
    view = memoryview(data)
    decoder = _Decoder(image)
    filler = _ARITHMETIC_FILLER if header.is_arithmetic else FILLER
    begin = 0
    try:
        for scan in scans:
            spare = _unneeded(data, scan)
            if spare and not header.is_arithmetic:
                end = max(begin, scan.end - spare)
                decoder.give(view[begin:end])
                if decoder.waits_for_marker(bytes(view[end : end + 1])):
                    raise broken("expected a whole JPEG image, got one with a damaged end")
                begin = min(end + 1, scan.end)
            decoder.give(b"".join((view[begin : scan.end], filler)))
            _check_scan(decoder, data, scan)
            begin = scan.end
        if not decoder.give(_END_OF_IMAGE):
            raise broken("expected a whole JPEG image, got one whose data cannot be decoded")
    finally:
        decoder.close()


def _unneeded(data: bytes, scan: Scan) -> int:
    """How many bytes at the end of the scan may not all be spare, or its end is damaged."""
    return _spare_zeros(data, scan.data_at, scan.end) if scan.has_marker else 2


def _check_scan(decoder: _Decoder, data: bytes, scan: Scan) -> None:
    """The scan just given is whole.

    Raises:
        Rejected: picture_broken when the decoder would need more.
    """
    is_whole = decoder.waits_for_marker(b"\0") and scan.end > scan.data_at
    if is_whole and scan.restarts:
        # The decoder may also wait for the next restart marker, and for data behind it.
        restarts = sum(data.count(bytes((0xFF, kind)), scan.data_at, scan.end) for kind in range(0xD0, 0xD8))
        decoder.give(bytes((0xFF, 0xD0 + restarts % 8)))
        is_whole = decoder.waits_for_marker(b"\0")
    if not is_whole:
        raise broken("expected a whole JPEG image, got one with a scan that ends too early")
