"""S3 Inventory: a manifest.json and its files, CSV or Parquet.

The format is described in https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html.
"""

from __future__ import annotations

import csv
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_plus

import msgspec

from shiwu.backfill.entries import Entry
from shiwu.backfill.sources.lines import READ_ERRORS, open_file
from shiwu.backfill.sources.tables import column_names, count_rows, parquet_rows
from shiwu.parts import Objects, SourceError

PARQUET_NAMES: Final = {
    "Bucket": "bucket",
    "Key": "key",
    "VersionId": "version_id",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
}
"""Name of a field in the schema of CSV → its column in Parquet files."""


class InventoryFile(msgspec.Struct, frozen=True):
    """One file of an inventory."""

    key: str
    md5: str = msgspec.field(default="", name="MD5checksum")


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """The parts of a manifest.json that are used."""

    source_bucket: str
    file_format: str
    file_schema: str
    files: tuple[InventoryFile, ...]
    destination_bucket: str = ""


class InventorySource:
    """The latest versions of the objects of an inventory, without delete markers. The cursor is `file:rows`.

    Args:
        where: the manifest, as s3://bucket/…/manifest.json, or a local path; then the files are looked for under their
            keys below its folder and the folders above it, and by their names beside it.

    Raises:
        SourceError: it is no manifest of a format that this version reads.
    """

    has_times = True
    is_unique = True

    def __init__(self, objects: Objects, where: str) -> None:
        self._objects = objects
        self._where = where
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            raw = objects.read(where) if where.startswith("s3://") else Path(where).read_bytes()
            self._manifest = msgspec.json.decode(raw, type=Manifest)
        except (OSError, msgspec.MsgspecError) as error:
            raise SourceError(f"{where}: expected a manifest.json of S3 Inventory ({error})") from None
        self._is_csv = self._manifest.file_format.upper() == "CSV"
        if not self._is_csv and self._manifest.file_format != "Parquet":
            raise SourceError(f"{where}: expected files in CSV or Parquet, got {self._manifest.file_format:.40}")
        names = [name.strip() for name in self._manifest.file_schema.split(",")] if self._is_csv else []
        if self._is_csv and not {"Bucket", "Key"} <= set(names):
            raise SourceError(
                f"{where}: expected Bucket and Key in fileSchema, got {self._manifest.file_schema!r:.200}"
            )
        self._names = names
        self._rows: int | None = None

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the entries after the cursor."""
        index, rows = map(int, cursor.split(":")) if cursor else (0, 0)
        for number in range(index, len(self._manifest.files)):
            path = self._fetch(self._manifest.files[number])
            yield from self._read(path, number, after=rows if number == index else 0)
            if self._folder is not None:
                path.unlink()

    def _read(self, path: Path, number: int, *, after: int) -> Iterator[Entry]:
        for count, row in enumerate(self._csv_rows(path) if self._is_csv else self._table_rows(path), start=1):
            if count <= after:
                continue
            entry = self._entry(row, cursor=f"{number}:{count}")
            if entry is not None:
                yield entry

    def _csv_rows(self, path: Path) -> Iterator[Mapping[str, Any]]:
        with open_file(path) as file:
            number = 0

            def texts() -> Iterator[str]:
                nonlocal number
                for number, line in enumerate(file, start=1):  # noqa: B007 named in errors
                    yield line.decode()

            try:
                for row in csv.reader(texts(), strict=True):
                    yield dict(zip(self._names, row, strict=False))
            except (csv.Error, UnicodeDecodeError, *READ_ERRORS) as error:
                raise SourceError(f"{path}, line {number}: expected CSV ({error})") from None

    def _table_rows(self, path: Path) -> Iterator[Mapping[str, Any]]:
        columns = _present(path, list(PARQUET_NAMES.values()))
        names = {column: name for name, column in PARQUET_NAMES.items()}
        for row in parquet_rows(path, columns, after=0):
            yield {names[column]: value for column, value in row.items()}

    def _entry(self, row: Mapping[str, Any], *, cursor: str) -> Entry | None:
        if _is_true(row.get("IsDeleteMarker")) or not _is_true(row.get("IsLatest", True)):
            return None
        key = str(row.get("Key") or "")
        key = unquote_plus(key) if self._is_csv else key
        size = str(row.get("Size") or 0)
        if key.endswith("/") and size == "0":
            return None
        return Entry(
            cursor,
            f"s3://{row.get('Bucket') or self._manifest.source_bucket}/{key}",
            version=str(row.get("VersionId") or row.get("ETag") or ""),
            size=int(size) if size.isdigit() else None,
            modified=_moment(row.get("LastModifiedDate")),
        )

    def _fetch(self, file: InventoryFile) -> Path:
        """The path of a file, downloaded if it lies in a bucket.

        Raises:
            SourceError: it is missing, or its content is not what the manifest says.
        """
        if self._where.startswith("s3://"):
            bucket = self._manifest.destination_bucket.removeprefix("arn:aws:s3:::")
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="shiwu-backfill-")
            path = Path(self._folder.name, hashlib.sha256(file.key.encode()).hexdigest()[:16] + Path(file.key).suffix)
            self._objects.download(f"s3://{bucket or self._where[5:].partition('/')[0]}/{file.key}", path)
        else:
            path = self._local(file.key)
        if file.md5:
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if digest != file.md5:
                raise SourceError(f"{file.key}: expected the MD5 {file.md5:.40} of the manifest, got {digest}")
        return path

    def _local(self, key: str) -> Path:
        folder = Path(self._where).resolve().parent
        places = [*(above / key for above in (folder, *folder.parents)), folder / Path(key).name]
        places.append(folder.parent / "data" / Path(key).name)
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise SourceError(f"expected {key} below {folder} or a folder above it, found no such file")
        return found

    def total(self, *, read: int, cursor: str) -> int | None:
        """The number of rows of Parquet files on this machine; None otherwise."""
        if self._is_csv or self._where.startswith("s3://"):
            return None
        if self._rows is None:
            self._rows = sum(count_rows(self._local(file.key)) for file in self._manifest.files)
        return self._rows

    def close(self) -> None:
        """Remove downloaded files."""
        if self._folder is not None:
            self._folder.cleanup()


def _present(path: Path, columns: Sequence[str]) -> list[str]:
    """Those of the columns that a file has, and those that it must have."""
    names = column_names(path)
    return [column for column in columns if column in names or column in {"bucket", "key"}]


def _is_true(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).lower() == "true"


def _moment(value: Any) -> datetime | None:
    if isinstance(value, str) and value:
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)
