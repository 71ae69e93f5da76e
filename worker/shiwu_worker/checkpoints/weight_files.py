"""Tells from its first bytes and its size whether a file of a checkpoint is whole. Never reads the weights."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO, Final

LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
LARGEST_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors library itself."""
_LEGACY_TORCH: Final = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""How torch.save began before torch 1.6."""


class WrongFile(ValueError):
    """A file is missing, empty, cut off, or a pointer to it; the text names it and the remedy."""


def check_whole(path: Path) -> None:
    """Refuse an empty file, a pointer of git-lfs, and what is no file.

    Raises:
        WrongFile: what is wrong.
        OSError: it cannot be read.
    """
    with _opened(path):
        pass


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file that its own header says is longer or shorter; raises what `check_whole` does."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or not 2 <= length <= min(LARGEST_HEADER_BYTES, size - 8):
            raise WrongFile(f"{path}: expected safetensors, got {size} bytes that are none; {_again(path)}")
        try:
            header = json.loads(file.read(length))
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise WrongFile(f"{path}: expected the header of safetensors; {_again(path)}") from error
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise WrongFile(f"{path}: expected {expected} bytes, got {size}; {_again(path)}")


def check_torch_file(path: Path) -> None:
    """Refuse a file of torch.save that is cut off; raises what `check_whole` does.

    A file of torch before 1.6 tells its length nowhere, so for these the loading tells.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_LEGACY_TORCH)) == _LEGACY_TORCH:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise WrongFile(f"{path}: expected a file of torch.save, got {size} bytes that are none or not all of one; "
                            f"{_again(path)}") from error  # fmt: skip
    if not any(name.endswith("data.pkl") for name in names):
        raise WrongFile(f"{path}: expected a file of torch.save, got another zip archive; {_again(path)}")


def _opened(path: Path) -> BinaryIO:
    """The file, open at its begin."""
    status = path.stat()  # before it is opened, which would wait for the writer of a pipe
    if not stat.S_ISREG(status.st_mode):
        raise WrongFile(f"{path}: expected a file")
    if status.st_size == 0:
        raise WrongFile(f"{path}: the file is empty; {_again(path)}")
    file = path.open("rb")
    try:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WrongFile(
                f"{path}: this is git-lfs's pointer and not the file; run `git lfs pull` in {path.parent}, "
                "or download the file"
            )
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _again(path: Path) -> str:
    return f"download {path.name} again"
