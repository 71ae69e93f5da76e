"""Files of the folders that the operator allows: the file that is judged is the file that is read."""

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
        allow: what may be read, everything below included; empty allows nothing.
        deny: what may not, whatever `allow` says.
    """

    def __init__(self, allow: tuple[Path, ...], deny: tuple[Path, ...] = ()) -> None:
        self._allow = tuple(folder.resolve() for folder in allow)
        self._deny = tuple(folder.resolve() for folder in deny)

    @contextmanager
    def open(self, reference: str) -> Iterator[tuple[BinaryIO, int]]:
        """The file of a reference, open for reading, and its size in bytes.

        Raises:
            Rejected: it is not in an allowed folder, not there, or no regular file.
            OSError: it can't be read.
        """
        raw = unquote_to_bytes(file_path(reference))
        if any(byte < 0x20 or byte == 0x7F for byte in raw):
            raise rejected(ErrorCode.INVALID_REFERENCE, "expected a path without control characters")
        path = os.fsdecode(raw)
        # Judged before anything is touched, with one answer for all that lies outside: nobody learns what exists there.
        self._check(os.path.realpath(path), path)
        # A handle that can't be read from, so opening has no effect on pipes and devices. What it is a handle of
        # stays the same, whatever happens to the names in the meantime.
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
        placement = Path(real)
        is_allowed = any(placement.is_relative_to(folder) for folder in self._allow)
        if not is_allowed or any(placement.is_relative_to(folder) for folder in self._deny):
            raise _outside(f"{path} is {real}")


def _outside(detail: str) -> Rejected:
    return rejected(
        ErrorCode.SOURCE_FORBIDDEN, "expected a file in one of the folders that the operator allows", detail=detail
    )
