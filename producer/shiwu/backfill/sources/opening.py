"""Opens the source that a text names."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from shiwu.backfill.entries import Entry
from shiwu.backfill.sources.base import Source
from shiwu.backfill.sources.bucket import BucketSource
from shiwu.backfill.sources.inventory import InventorySource
from shiwu.backfill.sources.lines import CsvFile, LineFile, StandardInput, parse_json, parse_text
from shiwu.backfill.sources.tables import ParquetFile
from shiwu.parts import Objects, SourceError, WrongSource

STANDARD_INPUT: Final = "-"
DEFAULT_COLUMN: Final = "image"
FORMS: Final = (
    "s3://bucket/prefix/, a manifest.json of S3 Inventory, a file that ends with .jsonl, .csv, .txt (also .gz) or "
    ".parquet, or - for standard input"
)


def open_source(where: str, *, objects: Objects, column: str = DEFAULT_COLUMN) -> Source:
    """The source with this name. Nothing is read yet, except for manifests and lists in a bucket.

    Raises:
        WrongSource: the name has no known form, or names nothing.
        SourceError: the source cannot be read.
    """
    if where == STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.isatty():
            raise WrongSource("expected a list on standard input, got a terminal; use shiwu backfill start … < LIST")
        return StandardInput(sys.stdin.buffer)
    kind = _kind(where)
    if where.startswith("s3://") and not kind:
        return BucketSource(objects, where)
    if kind == "manifest":
        return InventorySource(objects, where)
    if where.startswith("s3://"):
        return _Downloaded(objects, where, kind=kind, column=column)
    if not Path(where).is_file():
        what = "a folder is at" if Path(where).is_dir() else "there is no file"
        raise WrongSource(f"expected {FORMS}; {what} {where!r:.200}")
    return _open_file(Path(where), kind=kind, column=column)


def _kind(where: str) -> str:
    name = PurePosixPath(where).name.lower()
    if name == "manifest.json":
        return "manifest"
    kind = PurePosixPath(name.removesuffix(".gz")).suffix
    return kind if kind in {".jsonl", ".ndjson", ".csv", ".txt", ".parquet"} and not where.endswith("/") else ""


def _open_file(path: Path, *, kind: str, column: str) -> Source:
    match kind:
        case ".jsonl" | ".ndjson":
            return LineFile(path, parse_json)
        case ".txt":
            return LineFile(path, parse_text)
        case ".csv":
            return CsvFile(path)
        case ".parquet":
            return ParquetFile(path, column=column)
    raise WrongSource(f"expected {FORMS}, got {str(path)!r:.200}")


class _Downloaded:
    """A list in a bucket, which is copied to a temporary file first."""

    has_times = False
    is_unique = False

    def __init__(self, objects: Objects, where: str, *, kind: str, column: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shiwu-backfill-")
        path = Path(self._folder.name, PurePosixPath(where).name)
        try:
            objects.download(where, path)
        except SourceError:
            self._folder.cleanup()
            raise
        self._source = _open_file(path, kind=kind, column=column)

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the entries after the cursor."""
        return self._source.entries(cursor)

    def total(self, *, read: int, cursor: str) -> int | None:
        """As the file of this kind."""
        return self._source.total(read=read, cursor=cursor)

    def close(self) -> None:
        """Close and remove the file."""
        self._source.close()
        self._folder.cleanup()
