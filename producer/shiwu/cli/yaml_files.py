"""Reads the operator's YAML files, with a limit on their size.

Importing this module needs pyyaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from shiwu.contract import printable

MAX_FILE_BYTES: Final = 1024 * 1024


class FileError(ValueError):
    """A file cannot be read; the text says what was expected, without the content of the file."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words for true and false, because 1.1 reads the key `on` as true."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of at most `MAX_FILE_BYTES`.

    Raises:
        FileError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.load(read_text(path, max_bytes=MAX_FILE_BYTES), Loader=_Loader)  # noqa: S506 a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise FileError(f"{path}: expected YAML ({printable(str(error))})") from None


def read_text(path: Path, *, max_bytes: int) -> str:
    """The text of a small file in UTF-8.

    Raises:
        FileError: it cannot be read, is too large, or is no UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError(f"expected a readable file at {path} ({error.strerror})") from None
    if len(raw) > max_bytes:
        raise FileError(f"expected at most {max_bytes} bytes in {path}, got more")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(f"expected UTF-8 in {path}") from None
