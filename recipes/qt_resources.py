"""Reads Qt's binary resource files (.rcc), in which GCompris packs its photographs."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

MAGIC: Final = b"qres"
COMPRESSED, FOLDER, ZSTANDARD = 1, 2, 4
"""Flags of an entry."""


class ResourceError(Exception):
    """The data are no resource file that this module reads."""


def read_file(data: bytes, path: str) -> bytes:
    """The content of one file of a resource file.

    Raises:
        ResourceError: there is no such file.
    """
    for name, content in read_files(data):
        if name == path:
            return content
    raise ResourceError(f"expected a file {path}, found none")


def read_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file that is stored plainly or by zlib."""
    if data[:4] != MAGIC:
        raise ResourceError(f"expected {MAGIC!r} at the beginning, got {data[:4]!r}")
    version, tree, contents, names = struct.unpack_from(">IIII", data, 4)
    size = 22 if version >= 2 else 14

    def walk(index: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags = struct.unpack_from(">IH", data, tree + index * size)
        path = f"{prefix}/{_name(data, names + name_at)}".lstrip("/") if index else ""
        if flags & FOLDER:
            count, first = struct.unpack_from(">II", data, tree + index * size + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        elif not flags & ZSTANDARD:
            (at,) = struct.unpack_from(">I", data, tree + index * size + 10)
            (length,) = struct.unpack_from(">I", data, contents + at)
            content = data[contents + at + 4 : contents + at + 4 + length]
            # Qt writes the length of the unpacked content before zlib's bytes.
            yield path, zlib.decompress(content[4:]) if flags & COMPRESSED else content

    yield from walk(0, "")


def _name(data: bytes, at: int) -> str:
    """A name: its length in UTF-16 units, a hash, the units."""
    (units,) = struct.unpack_from(">H", data, at)
    return data[at + 6 : at + 6 + 2 * units].decode("utf-16-be")
