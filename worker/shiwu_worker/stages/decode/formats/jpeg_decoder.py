"""Decodes the scans of a JPEG so that missing image data is noticed.

libjpeg fills what is missing in a scan with grey and says so by a warning that Pillow does not pass on. It does so when
it meets a marker; without one it waits for more data. So each scan's data is given to Pillow's decoder without the
marker that ends it: a decoder that still waits has not seen all of the image.
"""

from __future__ import annotations

import io
from typing import Final

from PIL import Image, ImageFile

from shiwu_worker.stages.decode.formats.jpeg_segments import LARGEST_PADDING, JpegHeader, Markers, Scan
from shiwu_worker.stages.decode.image_errors import broken

_END_OF_IMAGE: Final = b"\xff\xd9"
FILLER: Final = b"\xff\0" * 8
"""Follows a scan's data: libjpeg looks up to eight bytes ahead while it decodes the last pixels. Ones, of which no
Huffman code consists, stand in for next to no pixels."""
_OTHER_FILLER: Final = bytes(8)
SMALL_BYTES: Final = 1024
"""A few bytes may be all of a small image, which is therefore decoded with either filler: it must not be seen."""
_ARITHMETIC_FILLER: Final = bytes(64)
"""The same for arithmetic codes, whose encoders leave zeros at the end out."""
MIN_HOLE: Final = 64
"""So many zeros at the end of a scan that no pixel needs are a hole in the file and no padding: a sixteenth of the
scan, between this and `LARGEST_PADDING`."""
LONG_RUN, LONG_RUN_PADDING = 512, 8
"""Where so many zeros end a scan they are no padding at all: all but a few bytes of them must be needed."""


def open_jpeg(header: JpegHeader) -> Image.Image:
    """The image as Pillow knows it from its frame, to be loaded by `load_jpeg`."""
    return Image.open(io.BytesIO(header.plain), formats=("JPEG",))


def load_jpeg(image: Image.Image, data: bytes, header: JpegHeader, scans: list[Scan]) -> None:
    """Decode the pixels.

    Args:
        scans: what `read_scans` found, where the image has several.

    Raises:
        Rejected: picture_broken when image data is missing.
        OSError: it cannot be decoded, or memory is short, which libjpeg does not tell apart.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    tile = image.tile
    fillers = (FILLER, _OTHER_FILLER) if len(data) - header.data_at <= SMALL_BYTES else (FILLER,)
    seen = set()
    for filler in (_ARITHMETIC_FILLER,) if header.is_arithmetic else fillers:
        image.tile = tile
        if header.is_one_scan:
            _load_one_scan(image, data, header, filler)
        else:
            _load_scans(image, data, header, scans, filler)
        image.tile = []
        if len(fillers) > 1:
            seen.add(image.tobytes())
    if len(seen) > 1:
        raise broken("expected a whole JPEG image, got one whose data ends before its last row")
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
        self._is_done = False

    def give(self, data: bytes | memoryview) -> bool:
        """Decode some more; whether the last row of pixels is out."""
        if self._is_done:
            raise broken("expected a whole JPEG image, got one that ends within a scan")
        given = memoryview(b"".join((self._left, data))) if self._left else memoryview(data)
        taken, error = self._decoder.decode(given)
        if taken < 0 and error:
            raise OSError(f"its data cannot be decoded, error {error}")
        self._is_done = taken < 0
        self._left = b"" if taken < 0 else bytes(given[taken:])
        return self._is_done

    def waits_for_marker(self, following: bytes) -> bool:
        """Whether the scan is decoded, given one more byte that is not 0xff.

        Between scans libjpeg passes over whatever is no marker. Within one it takes no byte before it can fill its
        buffer, which takes more than one.
        """
        is_waiting = not self._left
        self.give(following)
        return is_waiting and not self._left

    def close(self) -> None:
        """Free libjpeg's memory."""
        self._decoder.cleanup()


def _load_one_scan(image: ImageFile.ImageFile, data: bytes, header: JpegHeader, filler: bytes) -> None:
    """All of the image is in one scan: it is whole when the decoder is done without the marker that ends the scan."""
    is_plain = data.endswith(_END_OF_IMAGE) and not header.holds_more_images
    end = len(data) - 2 if is_plain else Markers(data).first_from(header.data_at)
    has_marker = end is not None
    end = len(data) if end is None else end
    if end <= header.data_at:
        raise broken("expected a whole JPEG image, got one without image data")
    spare = _spare_zeros(data, header.data_at, end) if has_marker else 1
    is_needed = _decode_scan(image, data, end, filler, spare=spare)
    if not is_needed:
        # The decoder was done before the end: it came upon an earlier marker, or padding follows the data.
        marker = Markers(data).first_from(header.data_at)
        if marker is not None and marker < end - 1:
            spare = _spare_zeros(data, header.data_at, marker)
            is_needed = _decode_scan(image, data, marker, filler, spare=spare)
    if not is_needed and spare:
        raise broken("expected a whole JPEG image, got one with a damaged end")


def _spare_zeros(data: bytes, begin: int, end: int) -> int:
    """How many zeros at the end of a scan may not all be spare; 0 where there are not so many."""
    if data.endswith(bytes(LONG_RUN), begin, end):
        return LONG_RUN_PADDING
    count = min(max((end - begin) // 16, MIN_HOLE), LARGEST_PADDING)
    return count if data.endswith(bytes(count), begin, end) else 0


def _decode_scan(image: ImageFile.ImageFile, data: bytes, end: int, filler: bytes, *, spare: int) -> bool:
    """Decode the only scan up to this place; whether the decoder needed its last bytes.

    Args:
        spare: how many these are, at least one.

    Raises:
        Rejected: picture_broken when it would need more.
    """
    view = memoryview(data)
    decoder = _Decoder(image)
    try:
        if filler is _ARITHMETIC_FILLER:
            _check_arithmetic(data, end)
            is_done = decoder.give(b"".join((view[:end], filler)))
            early = False
        else:
            first = end - max(1, spare)
            is_done = early = decoder.give(view[:first])
            if not is_done:
                is_done = decoder.give(b"".join((view[first:end], filler)))
    finally:
        decoder.close()
    if not is_done:
        raise broken("expected a whole JPEG image, got one whose data ends before its last row")
    return not early


def _load_scans(image: ImageFile.ImageFile, data: bytes, header: JpegHeader, scans: list[Scan], filler: bytes) -> None:
    """Each scan must be whole. What is refined by later scans that are missing is seen, with less detail."""
    view = memoryview(data)
    decoder = _Decoder(image)
    begin = 0
    try:
        for scan in scans:
            spare = _unneeded(data, scan)
            if header.is_arithmetic:
                _check_arithmetic(data, scan.end)
            elif spare:
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


def _check_arithmetic(data: bytes, end: int) -> None:
    """Arithmetic codes are never short of data, but their encoders leave zeros at the end out."""
    if data.endswith(bytes(MIN_HOLE), 0, end):
        raise broken("expected a whole JPEG image, got one with a damaged end")


def _unneeded(data: bytes, scan: Scan) -> int:
    """How many bytes at the end of the scan may not all be spare, or its end is damaged."""
    return _spare_zeros(data, scan.data_at, scan.end) if scan.has_marker else 2


def _check_scan(decoder: _Decoder, data: bytes, scan: Scan) -> None:
    """The scan just given is whole.

    Raises:
        Rejected: picture_broken when the decoder would need more.
    """
    is_whole = decoder.waits_for_marker(b"\0") and scan.end > scan.data_at
    if is_whole and scan.has_restarts:
        # The decoder may also wait for the next restart marker, and for data behind it.
        restarts = sum(data.count(bytes((0xFF, kind)), scan.data_at, scan.end) for kind in range(0xD0, 0xD8))
        decoder.give(bytes((0xFF, 0xD0 + restarts % 8)))
        is_whole = decoder.waits_for_marker(b"\0")
    if not is_whole:
        raise broken("expected a whole JPEG image, got one with a scan that ends too early")
