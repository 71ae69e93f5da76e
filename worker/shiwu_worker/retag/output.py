"""Files that appear under their name when they are complete."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from shiwu.parts import Objects, SourceError, TargetError
from shiwu_worker.errors import ExitCode, FatalError


@contextmanager
def new_file(name: str) -> Iterator[BinaryIO]:
    """A file or s3://bucket/key to write, which replaces one of this name at the end; - is standard output.

    Nothing is left of a file that is not completed.

    Raises:
        FatalError: with ExitCode.CONFIG, when it cannot be written.
    """
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    if name.startswith("s3://"):
        with _new_object(name) as file:
            yield file
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


@contextmanager
def _new_object(address: str) -> Iterator[BinaryIO]:
    try:
        with tempfile.NamedTemporaryFile(prefix="shiwu-retag-") as file:
            yield cast("BinaryIO", file)
            file.flush()
            Objects().upload(Path(file.name), address)
    except (OSError, SourceError, TargetError) as error:
        raise FatalError(ExitCode.CONFIG, f"{address}: cannot be written ({error})") from error
