"""Reads the chunks of a PNG, removes those with metadata, and detects missing rows.

Pillow reads text, colour profiles and other ancillary chunks, and rejects the file if one is damaged or large. It
accepts compressed data that ends after any complete row as the whole image.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageFile, UnidentifiedImageError

from shiwu_worker.stages.decode.image_errors import broken, too_large

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_IMAGE: Final = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_ANIMATION: Final = {b"acTL", b"fcTL", b"fdAT"}
_DATA: Final = {b"IDAT", b"fdAT"}
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_TRANSPARENCY: Final = {0: 2, 2: 6, 3: 1}
"""Colour type → least bytes of its transparent colour; the other types have alpha."""
_UNWRITTEN: Final = {"LA": (165, 255), "RGB": (165, 90, 201), "RGBA": (165, 90, 201, 255)}
"""The colour that marks the last row before decoding; a decoded row replaces it."""
_PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column, first row, step between columns, step between rows."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    kind: bytes
    begin: int
    """Where its data begins."""
    end: int
    """Where its data ends; its checksum follows."""

    def is_intact(self, data: bytes) -> bool:
        """Whether the chunk is complete and its checksum is correct."""
        if self.end + 4 > len(data):
            return False
        checksum = zlib.crc32(memoryview(data)[self.begin - 4 : self.end])
        return checksum == int.from_bytes(data[self.end : self.end + 4], "big")


@dataclass(frozen=True, slots=True)
class PngStream:
    """The chunks of a PNG."""

    data: bytes
    """The whole file."""
    chunks: tuple[_Chunk, ...]
    """The chunks of the image, in the order of the file."""
    exif: bytes
    """The EXIF data; empty if missing or damaged."""

    @property
    def is_animated(self) -> bool:
        """Whether there are chunks of an animation."""
        return any(chunk.kind in _ANIMATION for chunk in self.chunks)

    def plain(self, *, is_animated: bool) -> bytes:
        """The file without metadata."""
        view, parts = memoryview(self.data), []
        begin, at = 0, len(_SIGNATURE)
        for chunk in self.chunks:
            if chunk.kind in _ANIMATION and not is_animated:
                continue
            if chunk.begin - 8 != at:
                parts.append(view[begin:at])
                begin = chunk.begin - 8
            at = chunk.end + 4
        return b"".join((*parts, view[begin:at])) if parts else self.data


def read_png(data: bytes, *, max_chunks: int) -> PngStream:
    """Read the chunks.

    Raises:
        Rejected: picture_too_large with more than `max_chunks`, because each is read in Python. picture_broken
            without a header, or when the end of the file is missing and image data has a wrong checksum.
    """
    chunks: list[_Chunk] = []
    exif, colour, is_ended = b"", -1, False
    for number, chunk in enumerate(_chunks(data)):
        if number >= max_chunks:
            raise too_large(f"expected a PNG of at most {max_chunks} chunks, got more")
        kind = chunk.kind
        if kind in _IMAGE or kind in _ANIMATION:
            chunks.append(chunk)
            is_ended |= kind == b"IEND"
            colour = data[chunk.begin + 9] if kind == b"IHDR" and chunk.end <= len(data) else colour
        elif kind == b"tRNS" and chunk.is_intact(data):
            if chunk.end - chunk.begin >= _TRANSPARENCY.get(colour, 1 << 32):
                chunks.append(chunk)
        elif kind == b"eXIf" and chunk.is_intact(data):
            exif = data[chunk.begin : chunk.end]
    if not chunks or chunks[0].kind != b"IHDR" or chunks[0].end - chunks[0].begin != 13:
        raise broken("expected a whole PNG image, got one without a header")
    if not chunks[0].is_intact(data):
        raise broken("expected a whole PNG image, got one with a damaged header")
    _check_data(data, chunks, is_ended=is_ended)
    return PngStream(data, tuple(_without_broken_animation(data, chunks)), exif)


def _chunks(data: bytes) -> Iterator[_Chunk]:
    at = len(_SIGNATURE)
    while at + 8 <= len(data):
        begin = at + 8
        end = begin + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : begin]
        if not kind.isalpha():
            return
        yield _Chunk(kind, begin, end)
        if kind == b"IEND":
            return
        at = end + 4


def _check_data(data: bytes, chunks: list[_Chunk], *, is_ended: bool) -> None:
    """Check the checksums of image data, which cost time, only if something else is already wrong."""
    parts = [chunk for chunk in chunks if chunk.kind in _DATA and chunk.end + 4 <= len(data)]
    if parts and is_ended:
        last = parts[-1]
        is_zeroed = bytes(4) in (data[last.end - 4 : last.end], data[last.end : last.end + 4])
        parts = [last] if is_zeroed else []
    if not all(chunk.is_intact(data) for chunk in parts):
        raise broken("expected a whole PNG image, got one whose image data has a wrong checksum")


def _without_broken_animation(data: bytes, chunks: list[_Chunk]) -> Iterator[_Chunk]:
    """The chunks, without those of an animation whose beginning is damaged; the still image of the file remains."""
    first = next((number for number, chunk in enumerate(chunks) if chunk.kind in _DATA), len(chunks))
    is_intact = all(chunk.is_intact(data) for chunk in chunks[:first] if chunk.kind in _ANIMATION)
    for chunk in chunks:
        if is_intact or chunk.kind not in _ANIMATION:
            yield chunk


def open_png(stream: PngStream) -> Image.Image:
    """The image of a stream; `load_png` decodes it."""
    if stream.is_animated:
        with contextlib.suppress(UnidentifiedImageError, ValueError):  # from chunks of a wrong length or order
            return Image.open(io.BytesIO(stream.plain(is_animated=True)), formats=("PNG",))
    return Image.open(io.BytesIO(stream.plain(is_animated=False)), formats=("PNG",))


def load_png(image: Image.Image, stream: PngStream) -> None:
    """Decode the current frame.

    Raises:
        Rejected: picture_broken when the data ends before the last row.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    extents = image.tile[0].extents or (0, 0, *image.size)
    is_interlaced = bool(image.info.get("interlace"))
    row = _last_row(extents, is_interlaced=is_interlaced)
    if image._im is None:
        image.im = Image.new(image.mode, image.size, None).im
    mark = Image.new(image.mode, (row[2] - row[0], 1), _UNWRITTEN.get(image.mode, 165))
    image.im.paste(mark.im, row)
    frame = image.tell()
    image.load()
    may_be_incomplete = image.crop(row).tobytes() == mark.tobytes() or (is_interlaced and extents[3] - extents[1] == 1)
    if may_be_incomplete and not _has_all_rows(stream, frame, extents):
        raise broken("expected a whole PNG image, got one whose data ends before its last row")


def _last_row(extents: tuple[int, int, int, int], *, is_interlaced: bool) -> tuple[int, int, int, int]:
    """The row that is written last, as a box."""
    left, top, right, bottom = extents
    height = bottom - top
    last = bottom - 2 if is_interlaced and height > 1 and height % 2 else bottom - 1
    return left, last, right, last + 1


def _has_all_rows(stream: PngStream, frame: int, extents: tuple[int, int, int, int]) -> bool:
    """Whether a frame has as much data as its size needs; exact, but costs a second decompression."""
    header = stream.data[stream.chunks[0].begin : stream.chunks[0].end]
    bits = header[8] * _CHANNELS.get(header[9], 0)
    width, height = extents[2] - extents[0], extents[3] - extents[1]
    needed = 0
    for left, top, across, down in _PASSES if header[12] else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + (columns * bits + 7) // 8)
    decompressor = zlib.decompressobj()
    for part in _frame_data(stream, frame):
        rest: bytes = part
        while rest and needed > 0:
            needed -= len(decompressor.decompress(rest, min(needed, 1 << 20)))
            rest = decompressor.unconsumed_tail
            if decompressor.eof:
                return needed <= 0
    return needed <= 0


def _frame_data(stream: PngStream, frame: int) -> Iterator[bytes]:
    """The compressed data of a frame, numbered as in Pillow: an image before the animation is the first."""
    number, is_begun = -1, False
    for chunk in stream.chunks:
        if chunk.kind == b"fcTL":
            number, is_begun = number + 1, True
        elif chunk.kind in _DATA:
            if not is_begun:
                number, is_begun = 0, True
            if number == frame:
                yield stream.data[chunk.begin + 4 * (chunk.kind == b"fdAT") : chunk.end]
