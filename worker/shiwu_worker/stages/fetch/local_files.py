"""Opens files in the folders that the operator allows; the file that is checked is the file that is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from shiwu.contract import ErrorCode, file_path
from shiwu_worker.errors import Rejected
from shiwu_worker.stages.fetch.fetch_errors import rejected


class LocalFiles:
    """Opens file:// references.

    Args:
        allow: folders that may be read, with everything below them; empty allows nothing.
        deny: folders that may not be read, also below an allowed one.
    """

    def __init__(self, allow: tuple[Path, ...], deny: tuple[Path, ...] = ()) -> None:
        self._allow = tuple(folder.resolve() for folder in allow)
        self._deny = tuple(folder.resolve() for folder in deny)

    @contextmanager
    def open(self, reference: str) -> Iterator[tuple[BinaryIO, int]]:
        """The file of a reference, open for reading, and its size in bytes.

        Raises:
            Rejected: when it is outside the allowed folders, or no regular file.
            OSError: when it does not exist or cannot be read.
        """
        try:
            path = os.fsdecode(unquote_to_bytes(file_path(reference)))
        except ValueError as error:
            raise rejected(ErrorCode.INVALID_REFERENCE, f"expected {error}") from None
        # Checked before any access, and with one answer for everything outside, so an answer never tells what exists.
        self._check(os.path.realpath(path), path)
        # This handle cannot be read from, so opening it has no effect on pipes and devices. It refers to the same file
        # even if names change in the meantime.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            own_name = f"/proc/self/fd/{handle}"
            self._check(os.readlink(own_name), path)
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a folder"
                raise rejected(ErrorCode.SOURCE_NOT_A_FILE, f"expected a file, got {kind}: {path}")
            with open(own_name, "rb", buffering=0) as file:
                yield file, os.fstat(file.fileno()).st_size
        finally:
            os.close(handle)

    def _check(self, real: str, path: str) -> None:
        target = Path(real)
        is_allowed = any(target.is_relative_to(folder) for folder in self._allow)
        if not is_allowed or any(target.is_relative_to(folder) for folder in self._deny):
            raise _outside(f"{path} is {real}")


def _outside(detail: str) -> Rejected:
    return rejected(
        ErrorCode.SOURCE_FORBIDDEN, "expected a file in one of the folders that the operator allows", detail=detail
    )
