"""Sources of one entry a line: JSON lines, CSV, plain references, standard input."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast
from urllib.parse import unquote_plus

import msgspec

from shiwu.backfill.entries import Entry
from shiwu.contract import MAX_IMAGE_CHARS, without_logins
from shiwu.parts import SourceError

MAX_LINE_BYTES: Final = 1024 * 1024
"""Far longer than a reference with the largest metadata."""
SHOWN_CHARS: Final = 80
"""Of a line in an error."""
BOM: Final = b"\xef\xbb\xbf"
IMAGE_NAMES: Final = ("image", "source-ref", "reference")
"""Names of the column or key with the reference, the first that is there."""
READ_ERRORS: Final = (OSError, EOFError, zlib.error)
"""What reading raises; the last two are of compressed files that are cut or damaged."""
Parse = Callable[[bytes, str, str], Entry | None]
"""Gets a line, the cursor after it, and where it is, for errors."""


class LineFile:
    """A local file with one entry a line, compressed if its name ends with .gz. The cursor is an offset in bytes."""

    has_times = False
    is_unique = False

    def __init__(self, path: Path, parse: Parse) -> None:
        self._path = path
        self._parse = parse
        self._file: BinaryIO | None = None

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the entries after the cursor."""
        self._file = file = open_file(self._path)
        offset = int(cursor or 0)
        try:
            file.seek(offset)
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                offset += len(line)
                if offset == len(line):
                    line = line.removeprefix(BOM)
                # Where a run goes on in the middle, the lines before are not counted again.
                place = f"the line that ends at byte {offset}" if cursor else f"line {number}"
                entry = self._parse(line, str(offset), place)
                if entry is not None:
                    yield entry
        except READ_ERRORS as error:
            raise SourceError(f"{self._path}: {error}") from None

    def total(self, *, read: int, cursor: str) -> int | None:
        """An estimate from the mean length of the lines so far; None for compressed files."""
        return estimate(self._path, read=read, offset=int(cursor or 0))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class StandardInput:
    """Lines of standard input, in the form of JSON lines or plain references. The cursor is the number of lines."""

    has_times = False
    is_unique = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Skip the lines before the cursor, and yield the entries of the others."""
        skipped, number = int(cursor or 0), 0
        while line := self._stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if number > skipped and (entry := parse_text(line, str(number), f"line {number}")) is not None:
                yield entry

    def total(self, *, read: int, cursor: str) -> int | None:
        """None: the end is not known before it comes."""
        return None

    def close(self) -> None:
        """Do nothing: the stream belongs to the process."""


class CsvFile:
    """A CSV file with a header that names the column `image`, or S3's form `Bucket,Key[,VersionId]` without one.

    In S3's form keys are percent-encoded. Without a header, a single column has references. The cursor is an offset.
    """

    has_times = False
    is_unique = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the entries after the cursor."""
        self._file = file = open_file(self._path)
        offset = number = 0

        def place() -> str:
            # Where a run goes on in the middle, the lines before are not counted again.
            return f"{self._path}, the line that ends at byte {offset}" if cursor else f"{self._path}, line {number}"

        def texts() -> Iterator[str]:
            nonlocal offset, number
            while line := file.readline(MAX_LINE_BYTES + 1):
                offset += len(line)
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise SourceError(f"{place()}: expected at most {MAX_LINE_BYTES} bytes, got more")
                yield decode_line(line.removeprefix(BOM) if offset == len(line) else line, place)

        try:
            rows = csv.reader(texts(), strict=True)
            first = next((row for row in rows if row), None)
            if first is None:
                return
            header = read_header(first, self._path)
            if cursor:
                offset = int(cursor)
                file.seek(offset)
                rows = csv.reader(texts(), strict=True)
            elif not header:
                yield row_entry(first, header, str(offset))
            for row in rows:
                if row:
                    yield row_entry(row, header, str(offset))
        except (csv.Error, *READ_ERRORS) as error:
            raise SourceError(f"{place()}: {error}") from None

    def total(self, *, read: int, cursor: str) -> int | None:
        """An estimate from the mean length of the lines so far; None for compressed files."""
        return estimate(self._path, read=read, offset=int(cursor or 0))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its name ends with .gz.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        if path.suffix == ".gz":
            return cast("BinaryIO", gzip.open(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise SourceError(f"expected a readable list at {path}, {error.strerror or error}") from None


def estimate(path: Path, *, read: int, offset: int) -> int | None:
    """How many lines a file has, from the mean length of those that were read."""
    if path.suffix == ".gz" or not offset or not read:
        return None
    return max(read, round(read * os.stat(path).st_size / offset))


def decode_line(line: bytes, place: Callable[[], str]) -> str:
    """The text of a line.

    Args:
        place: names the line in an error.

    Raises:
        SourceError: it is no UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{place()}: expected UTF-8 ({error.reason}); save the list as UTF-8") from None


# ------------------------------------------------------------------------------------ one line
def parse_json(line: bytes, cursor: str, place: str) -> Entry | None:
    """The entry of a JSON line: `image` or `source-ref`, and all other keys as metadata; None for an empty line.

    A single other key `metadata` is the metadata itself.

    Args:
        place: names the line in an error.
    """
    text = line.strip()
    if not text:
        return None
    if len(line) > MAX_LINE_BYTES:
        return _no_entry(text, cursor, place, f"a line of at most {MAX_LINE_BYTES} bytes")
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _no_entry(text, cursor, place, f"a JSON object ({error})")
    if isinstance(value, dict):
        name = next((name for name in IMAGE_NAMES if name in value), None)
        if name is not None and isinstance(image := value.pop(name), str):
            own: Any = value["metadata"] if value.keys() == {"metadata"} else value
            return Entry(cursor, image, metadata=own or None)
    return _no_entry(text, cursor, place, "an object with `image` or `source-ref`, a text")


def parse_text(line: bytes, cursor: str, place: str) -> Entry | None:
    """The entry of a line with a reference or a JSON object; None for an empty line and one that begins with #."""
    text = line.strip()
    if text.startswith(b"{"):
        return parse_json(line, cursor, place)
    if not text or text.startswith(b"#"):
        return None
    try:
        return Entry(cursor, text.decode())
    except UnicodeDecodeError as error:
        return _no_entry(text, cursor, place, f"UTF-8 ({error.reason})")


def _no_entry(text: bytes, cursor: str, place: str, expected: str) -> Entry:
    shown = _shown(text.decode(errors="replace"))
    return Entry(cursor, "", version=text.hex(), error=f"{place}: expected {expected}, got {shown}")


def _shown(text: str) -> str:
    """The beginning of a line for an error, without logins and queries of URLs, which may be secrets."""
    plain = without_logins(text[:MAX_IMAGE_CHARS]).partition("?")[0][:SHOWN_CHARS]
    return repr(plain if plain == text else f"{plain}…")


# ------------------------------------------------------------------------------------ one row
def read_header(row: list[str], path: Path) -> list[str]:
    """The names of the columns, empty where the first row is one of data.

    Raises:
        SourceError: it is neither.
    """
    names = [name.strip() for name in row]
    lower = [name.lower() for name in names]
    if any(name in IMAGE_NAMES for name in names):
        return names
    if lower[:2] == ["bucket", "key"]:
        return ["bucket", "key", *lower[2:]]
    if "://" in row[0] or (len(row) in {2, 3} and row[0]):
        return []
    raise SourceError(
        f"{path}: expected a header with the column image, rows of one reference, or S3's Bucket,Key[,VersionId]; "
        f"got {_shown(','.join(row))}"
    )


def row_entry(row: list[str], header: list[str], cursor: str) -> Entry:
    """The entry of one row."""
    if not header and "://" in row[0]:
        return Entry(cursor, row[0].strip())
    names = header or ["bucket", "key", "versionid"]
    values = dict(zip(names, row, strict=False))
    name = next((name for name in IMAGE_NAMES if name in values), None)
    if name is not None:
        reference = values.pop(name).strip()
        return Entry(cursor, reference, metadata=values or None)
    key = unquote_plus(values.get("key", ""))
    version = values.get("versionid", "")
    ending = f"?versionId={version}" if version else ""
    return Entry(cursor, f"s3://{values.get('bucket', '')}/{key}{ending}")
