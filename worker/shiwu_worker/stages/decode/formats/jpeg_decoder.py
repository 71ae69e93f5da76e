"""Decodes the scans of a JPEG so that missing image data is detected.

libjpeg fills missing parts of a scan with grey and emits a warning that Pillow does not pass on. It does so when it
reads a marker; without a marker it waits for more data. So each scan is given to Pillow's decoder without the marker
that ends it: if the decoder still waits, data is missing.
"""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, ImageFile

from shiwu_worker.stages.decode.formats.jpeg_segments import MAX_PADDING, JpegHeader, Markers, Scan
from shiwu_worker.stages.decode.image_errors import broken

_END_OF_IMAGE: Final = b"\xff\xd9"
FILLER: Final = b"\xff\0" * 8
"""Follows the data of a scan: libjpeg reads up to eight bytes ahead while it decodes the last pixels. No Huffman
code consists of ones only, so these bits give almost no pixels."""
_OTHER_FILLER: Final = bytes(8)
SMALL_BYTES: Final = 1024
"""Up to this size an image is decoded with both fillers, and the pixels must not differ."""
_ARITHMETIC_FILLER: Final = bytes(64)
"""The filler for arithmetic codes, whose encoders omit zeros at the end."""
MIN_HOLE: Final = 64
"""Least number of unneeded zeros at the end of a scan that count as missing data and not as padding. The number is a
sixteenth of the scan, between this and `MAX_PADDING`."""
LONG_RUN: Final = 512
"""A scan that ends with this many zeros has no padding: the decoder must need all but a few of them."""
LONG_RUN_PADDING: Final = 8


def open_jpeg(header: JpegHeader) -> Image.Image:
    """The image as Pillow reads it from the frame header; `load_jpeg` decodes it."""
    return Image.open(io.BytesIO(header.plain), formats=("JPEG",))


def load_jpeg(image: Image.Image, data: bytes, header: JpegHeader, scans: list[Scan]) -> None:
    """Decode the pixels.

    Args:
        scans: the result of `read_scans`; empty if the image has one scan.

    Raises:
        Rejected: picture_broken when image data is missing.
        OSError: when the image cannot be decoded or memory is short; libjpeg does not distinguish them.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    tile = image.tile
    fillers = (FILLER, _OTHER_FILLER) if len(data) - header.data_at <= SMALL_BYTES else (FILLER,)
    results = set()
    for filler in (_ARITHMETIC_FILLER,) if header.is_arithmetic else fillers:
        image.tile = tile
        if header.is_one_scan:
            _load_one_scan(image, data, header, filler)
        else:
            _load_scans(image, data, header, scans, filler)
        image.tile = []
        if len(fillers) > 1:
            results.add(image.tobytes())
    if len(results) > 1:
        raise broken("expected a whole JPEG image, got one whose data ends before its last row")
    image.readonly = 0
    image.fp = None


class _Decoder:
    """Pillow's decoder of one image, and the data that it has not consumed yet."""

    def __init__(self, image: ImageFile.ImageFile) -> None:
        image.load_prepare()
        name, extents, _, args = image.tile[0]
        self._decoder = Image._getdecoder(image.mode, name, args, image.decoderconfig)
        self._decoder.setimage(image.im, extents)
        self._unread = b""
        self._is_done = False

    def feed(self, data: bytes | memoryview) -> bool:
        """Decode more data; returns whether the last row of pixels is complete."""
        if self._is_done:
            raise broken("expected a whole JPEG image, got one that ends within a scan")
        fed = memoryview(b"".join((self._unread, data))) if self._unread else memoryview(data)
        consumed, error = self._decoder.decode(fed)
        if consumed < 0 and error:
            raise OSError(f"its data cannot be decoded, error {error}")
        self._is_done = consumed < 0
        self._unread = b"" if consumed < 0 else bytes(fed[consumed:])
        return self._is_done

    def waits_for_marker(self, following: bytes) -> bool:
        """Whether the scan is decoded completely; feeds one more byte, which must not be 0xff.

        Between scans libjpeg skips bytes that are no marker. Within a scan it consumes nothing until it can fill its
        buffer, for which one byte is too little.
        """
        is_waiting = not self._unread
        self.feed(following)
        return is_waiting and not self._unread

    def close(self) -> None:
        """Free libjpeg's memory."""
        self._decoder.cleanup()


def _load_one_scan(image: ImageFile.ImageFile, data: bytes, header: JpegHeader, filler: bytes) -> None:
    """Decode an image of one scan; it is complete if the decoder finishes without the marker that ends the scan."""
    is_plain = data.endswith(_END_OF_IMAGE) and not header.has_more_images
    end = len(data) - 2 if is_plain else Markers(data).first_from(header.data_at)
    has_marker = end is not None
    end = len(data) if end is None else end
    if end <= header.data_at:
        raise broken("expected a whole JPEG image, got one without image data")
    spare = _suspicious_zeros(data, header.data_at, end) if has_marker else 1
    is_needed = _decode_scan(image, data, end, filler, spare=spare)
    if not is_needed:
        # The decoder finished before the end: it read an earlier marker, or padding follows the data.
        marker = Markers(data).first_from(header.data_at)
        if marker is not None and marker < end - 1:
            spare = _suspicious_zeros(data, header.data_at, marker)
            is_needed = _decode_scan(image, data, marker, filler, spare=spare)
    if not is_needed and spare:
        raise broken("expected a whole JPEG image, got one with a damaged end")


def _suspicious_zeros(data: bytes, begin: int, end: int) -> int:
    """How many zeros at the end of a scan must not all be unneeded; 0 if the scan does not end with that many."""
    if data.endswith(bytes(LONG_RUN), begin, end):
        return LONG_RUN_PADDING
    count = min(max((end - begin) // 16, MIN_HOLE), MAX_PADDING)
    return count if data.endswith(bytes(count), begin, end) else 0


def _decode_scan(image: ImageFile.ImageFile, data: bytes, end: int, filler: bytes, *, spare: int) -> bool:
    """Decode the only scan up to `end`; returns whether the decoder needed its last bytes.

    Args:
        spare: the number of these last bytes, at least one.

    Raises:
        Rejected: picture_broken when the decoder needs more data.
    """
    view = memoryview(data)
    decoder = _Decoder(image)
    try:
        if filler is _ARITHMETIC_FILLER:
            _check_arithmetic(data, end)
            is_done = decoder.feed(b"".join((view[:end], filler)))
            is_early = False
        else:
            first = end - max(1, spare)
            is_done = is_early = decoder.feed(view[:first])
            if not is_done:
                is_done = decoder.feed(b"".join((view[first:end], filler)))
    finally:
        decoder.close()
    if not is_done:
        raise broken("expected a whole JPEG image, got one whose data ends before its last row")
    return not is_early


def _load_scans(image: ImageFile.ImageFile, data: bytes, header: JpegHeader, scans: list[Scan], filler: bytes) -> None:
    """Decode several scans, each of which must be complete. Without later scans the image only has less detail."""
    view = memoryview(data)
    decoder = _Decoder(image)
    begin = 0
    try:
        for scan in scans:
            spare = _suspicious_bytes(data, scan)
            if header.is_arithmetic:
                _check_arithmetic(data, scan.end)
            elif spare:
                end = max(begin, scan.end - spare)
                decoder.feed(view[begin:end])
                if decoder.waits_for_marker(bytes(view[end : end + 1])):
                    raise broken("expected a whole JPEG image, got one with a damaged end")
                begin = min(end + 1, scan.end)
            decoder.feed(b"".join((view[begin : scan.end], filler)))
            _check_scan(decoder, data, scan)
            begin = scan.end
        if not decoder.feed(_END_OF_IMAGE):
            raise broken("expected a whole JPEG image, got one whose data cannot be decoded")
    finally:
        decoder.close()


def _check_arithmetic(data: bytes, end: int) -> None:
    """Check the end of an arithmetic-coded scan. Its decoder never lacks data; its encoder writes no zeros."""
    if data.endswith(bytes(MIN_HOLE), 0, end):
        raise broken("expected a whole JPEG image, got one with a damaged end")


def _suspicious_bytes(data: bytes, scan: Scan) -> int:
    """How many bytes at the end of the scan must not all be unneeded; otherwise its end is damaged."""
    return _suspicious_zeros(data, scan.data_at, scan.end) if scan.has_marker else 2


def _check_scan(decoder: _Decoder, data: bytes, scan: Scan) -> None:
    """Check that the scan just fed is complete.

    Raises:
        Rejected: picture_broken when the decoder needs more data.
    """
    is_whole = decoder.waits_for_marker(b"\0") and scan.end > scan.data_at
    if is_whole and scan.has_restarts:
        # The decoder may also wait for the next restart marker, and for data after it.
        restarts = sum(data.count(bytes((0xFF, kind)), scan.data_at, scan.end) for kind in range(0xD0, 0xD8))
        decoder.feed(bytes((0xFF, 0xD0 + restarts % 8)))
        is_whole = decoder.waits_for_marker(b"\0")
    if not is_whole:
        raise broken("expected a whole JPEG image, got one with a scan that ends too early")
