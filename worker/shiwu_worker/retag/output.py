"""Files that appear under their name when they are complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shiwu_worker.errors import ExitCode, FatalError


@contextmanager
def new_file(name: str) -> Iterator[BinaryIO]:
    """A file to write, which replaces one of this name at the end; - is standard output.

    Nothing is left of a file that is not completed.

    Raises:
        FatalError: with ExitCode.CONFIG, when it cannot be written.
    """
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    path = Path(name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise FatalError(ExitCode.CONFIG, f"{name}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
