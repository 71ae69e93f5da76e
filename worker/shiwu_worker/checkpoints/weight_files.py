"""Checks by first bytes and size whether a file of a checkpoint is complete. Never reads the weights."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO, Final

LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors library itself."""
_LEGACY_TORCH: Final = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The first bytes of files that torch.save wrote before torch 1.6."""


class WrongFile(ValueError):
    """A file is missing, empty, cut off, or a pointer to it; the text names it and the remedy."""


def check_whole(path: Path) -> None:
    """Reject an empty file, a pointer of git-lfs, and anything that is no file.

    Raises:
        WrongFile: names the file, the error and the remedy.
        OSError: when the file cannot be read.
    """
    with _open_checked(path):
        pass


def check_safetensors(path: Path) -> None:
    """Reject a safetensors file whose size differs from its header; raises the errors of `check_whole`."""
    with _open_checked(path) as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise WrongFile(f"{path}: expected safetensors, got {size} bytes that are none; {_download_again(path)}")
        try:
            header = json.loads(file.read(length))
            ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise WrongFile(f"{path}: expected the header of safetensors; {_download_again(path)}") from error
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise WrongFile(f"{path}: expected {expected} bytes, got {size}; {_download_again(path)}")


def check_torch_file(path: Path) -> None:
    """Reject a file of torch.save that is cut off; raises the errors of `check_whole`.

    Files of torch before 1.6 do not contain their length, so only loading them shows whether they are complete.
    """
    with _open_checked(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_LEGACY_TORCH)) == _LEGACY_TORCH:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            text = f"expected a file of torch.save, got {size} bytes that are none or not all of one"
            raise WrongFile(f"{path}: {text}; {_download_again(path)}") from error
    if not any(name.endswith("data.pkl") for name in names):
        raise WrongFile(f"{path}: expected a file of torch.save, got another zip archive; {_download_again(path)}")


def _open_checked(path: Path) -> BinaryIO:
    """Open a file at its begin, after the checks of `check_whole`."""
    status = path.stat()  # before it is opened, because opening a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode):
        raise WrongFile(f"{path}: expected a file")
    if status.st_size == 0:
        raise WrongFile(f"{path}: the file is empty; {_download_again(path)}")
    file = path.open("rb")
    try:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WrongFile(
                f"{path}: this is git-lfs's pointer and not the file; run `git lfs pull` in {path.parent}, "
                "or download the file"
            )
        file.seek(0)
    except BaseException:  # no failure may leave the file open
        file.close()
        raise
    return file


def _download_again(path: Path) -> str:
    return f"download {path.name} again"
