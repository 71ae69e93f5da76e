"""recipes.qt_resources: files in Qt's resource format."""

from __future__ import annotations

import struct
import zlib

import pytest
from recipes.qt_resources import COMPRESSED, FOLDER, ResourceError, read_file, read_files


def resource_file(files: dict[str, bytes], *, is_compressed: bool = False) -> bytes:
    """A resource file of format 1 with a root and one folder `a` that holds these files."""
    names = contents = b""
    places = {}
    for name in ["a", *files]:
        places[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHII", 0, FOLDER, 1, 1) + struct.pack(">IHII", places["a"], FOLDER, len(files), 2)
    for name, data in files.items():
        stored = struct.pack(">I", len(data)) + zlib.compress(data) if is_compressed else data
        flags = COMPRESSED if is_compressed else 0
        tree += struct.pack(">IHHHI", places[name], flags, 0, 0, len(contents))
        contents += struct.pack(">I", len(stored)) + stored
    at = 20
    head = struct.pack(">4sIIII", b"qres", 1, at, at + len(tree), at + len(tree) + len(contents))
    return head + tree + contents + names


@pytest.mark.parametrize("is_compressed", [False, True])
def test_files_are_read_with_their_paths(is_compressed: bool) -> None:
    """Plain and compressed ones."""
    files = {"x.webp": b"first" * 50, "图.jpg": b"second"}
    data = resource_file(files, is_compressed=is_compressed)
    assert dict(read_files(data)) == {f"a/{name}": content for name, content in files.items()}
    assert read_file(data, "a/图.jpg") == b"second"


def test_missing_file_is_an_error() -> None:
    """Named in the text."""
    with pytest.raises(ResourceError, match=r"a/z\.jpg"):
        read_file(resource_file({"x": b"1"}), "a/z.jpg")


def test_other_data_are_refused() -> None:
    """Not read as offsets."""
    with pytest.raises(ResourceError, match="qres"):
        list(read_files(b"PK\x03\x04" + bytes(40)))
