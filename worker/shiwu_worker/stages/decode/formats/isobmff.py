"""Finds the items of an AVIF or HEIC file in the boxes of the ISO base media file format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_BOXES: Final = 5000
"""Most boxes and items that are read; the grid of a 50-megapixel HEIC has about 200 items."""
HOLE_BYTES: Final = 64
"""Number of consecutive zeros that coded image data never has: its codes are not so redundant, and HEVC forbids it."""
CODED_KINDS: Final = {b"av01", b"hvc1"}
_EMPTY_EXIF: Final = b"\0\0\0\0II*\0\x08\0\0\0\0\0"
"""Offset of the TIFF header, and a TIFF header with a directory without entries."""


@dataclass(frozen=True, slots=True)
class Item:
    """An item of the file: an image, a tile of one, or data about one."""

    kind: bytes
    extents: tuple[tuple[int, int], ...]
    """Begin and end of each of its parts in the file."""


def has_holes(data: bytes) -> bool:
    """Whether coded image data has a long run of zeros, which decoders turn into a flat area without an error."""
    return any(
        data.find(bytes(HOLE_BYTES), begin, end) >= 0
        for item in items(data)
        if item.kind in CODED_KINDS
        for begin, end in item.extents
    )


def without_exif(data: bytes) -> bytes | None:
    """The file with its EXIF data emptied, or None if it has none."""
    found = [extent for item in items(data) if item.kind == b"Exif" for extent in item.extents]
    body = bytearray(data)
    for begin, end in found:
        if end - begin >= len(_EMPTY_EXIF):
            body[begin:end] = _EMPTY_EXIF + bytes(end - begin - len(_EMPTY_EXIF))
    return bytes(body) if found else None


def items(data: bytes) -> list[Item]:
    """The items that are stored in the file itself; if boxes are damaged, those that can be read."""
    for kind, begin, end in _boxes(data, 0, len(data)):
        if kind == b"meta":
            boxes = {box: (first, last) for box, first, last in _boxes(data, begin + 4, end)}
            if b"iloc" in boxes and b"iinf" in boxes:
                kinds = _kinds(data, *boxes[b"iinf"])
                found = _locations(_Reader(data, *boxes[b"iloc"]))
                return [Item(kinds.get(number, b""), extents) for number, extents in found]
            return []
    return []


def _boxes(data: bytes, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of the contents of each box."""
    for _ in range(MAX_BOXES):
        if begin + 8 > end:
            return
        size, header = int.from_bytes(data[begin : begin + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[begin + 8 : begin + 16], "big"), 16
        elif size == 0:
            size = end - begin
        if size < header:
            return
        yield data[begin + 4 : begin + 8], begin + header, min(begin + size, end)
        begin += size


def _kinds(data: bytes, begin: int, end: int) -> dict[int, bytes]:
    """Number → kind of each item, from the entries of `iinf`."""
    first = begin + (6 if data[begin : begin + 1] == b"\0" else 8)
    found = {}
    for kind, at, last in _boxes(data, first, end):
        if kind == b"infe" and at + 12 <= last:
            width = 4 if data[at] >= 3 else 2
            # After the number of the item comes the number of its protection.
            number = int.from_bytes(data[at + 4 : at + 4 + width], "big")
            found[number] = data[at + 6 + width : at + 10 + width]
    return found


class _Reader:
    """Reads numbers of varying width, one after the other; gives zeros after the end."""

    def __init__(self, data: bytes, begin: int, end: int) -> None:
        self._data, self._at, self._end = data, begin, end

    @property
    def file_bytes(self) -> int:
        return len(self._data)

    @property
    def is_at_end(self) -> bool:
        return self._at >= self._end

    def number(self, width: int) -> int:
        begin, self._at = self._at, self._at + width
        return int.from_bytes(self._data[begin : min(self._at, self._end)], "big")


def _locations(reader: _Reader) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Number and extents of each item in `iloc` that is stored in the file."""
    version = reader.number(1)
    reader.number(3)
    widths = reader.number(2)
    offset_bytes, length_bytes, base_bytes, index_bytes = (widths >> shift & 15 for shift in (12, 8, 4, 0))
    extents_left = MAX_BOXES
    for _ in range(min(reader.number(4 if version == 2 else 2), MAX_BOXES)):
        number = reader.number(4 if version == 2 else 2)
        method = reader.number(2) & 15 if version else 0
        reader.number(2)
        base = reader.number(base_bytes)
        extents = []
        for _ in range(reader.number(2)):
            extents_left -= 1
            if extents_left < 0 or reader.is_at_end:
                return
            reader.number(index_bytes if version else 0)
            begin = base + reader.number(offset_bytes)
            length = reader.number(length_bytes)
            extents.append((begin, begin + length if length else reader.file_bytes))
        if method == 0:
            yield number, tuple(extents)
