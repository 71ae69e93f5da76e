"""Reads the orientation of an image from its EXIF data, and nothing else of it."""

from __future__ import annotations

import struct
from typing import Final

ORIENTATION: Final = 0x0112
MAX_ENTRIES: Final = 512
"""Entries of the first directory that are read; cameras write about twenty."""
_ENTRY_BYTES: Final = 12
_NUMBER_TYPES: Final = {1: "B", 3: "H", 4: "L"}
"""BYTE, SHORT and LONG: some programs write the orientation in another type than the SHORT of the standard."""


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8; 1 (upright) if there is none or the data is damaged."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return 1
    (at,) = struct.unpack_from(f"{order}L", data, 4)
    if at + 2 > len(data):
        return 1
    (count,) = struct.unpack_from(f"{order}H", data, at)
    for entry in range(at + 2, at + 2 + min(count, MAX_ENTRIES) * _ENTRY_BYTES, _ENTRY_BYTES):
        if entry + _ENTRY_BYTES > len(data):
            break
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag == ORIENTATION:
            number = _NUMBER_TYPES.get(kind)
            value: int = struct.unpack_from(f"{order}{number}", data, entry + 8)[0] if number else 1
            return value if 1 <= value <= 8 else 1
    return 1
