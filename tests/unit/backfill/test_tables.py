"""Parquet files and S3 Inventory, with files as AWS writes them."""

from __future__ import annotations

import gzip
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shiwu.backfill.entries import Entry
from shiwu.backfill.sources.base import Source
from shiwu.backfill.sources.opening import open_source
from shiwu.parts import Objects, SourceError

SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
ROWS = [
    ("photos", "in/a b+.jpg", "v1", True, False, 10, "2026-11-01T10:00:00.000Z", "e1"),
    ("photos", "in/a b+.jpg", "v0", False, False, 10, "2026-10-01T10:00:00.000Z", "e0"),
    ("photos", "in/gone.jpg", "v2", True, True, None, "2026-11-02T10:00:00.000Z", ""),
    ("photos", "in/folder/", "", True, False, 0, "2026-11-02T10:00:00.000Z", "e3"),
    ("photos", "in/猫.jpg", "", True, False, 30, "2026-11-03T10:00:00.000Z", "e4"),
]
KEPT = [
    ("s3://photos/in/a b+.jpg", "v1", 10, datetime(2026, 11, 1, 10, tzinfo=UTC)),
    ("s3://photos/in/猫.jpg", "e4", 30, datetime(2026, 11, 3, 10, tzinfo=UTC)),
]
ENCODED = {"in/a b+.jpg": "in/a+b%2B.jpg", "in/猫.jpg": "in/%E7%8C%AB.jpg"}


def read(source: Source, cursor: str = "") -> list[Entry]:
    """All entries after the cursor."""
    try:
        return list(source.entries(cursor))
    finally:
        source.close()


def opened(path: Path, column: str = "image") -> Source:
    """The source at this path."""
    return open_source(str(path), objects=Objects({}), column=column)


def write_inventory(folder: Path, kind: str, parts: int = 3) -> Path:
    """A manifest and its files, each with all rows, in the folders of a destination bucket."""
    data = folder / "inv" / "data"
    data.mkdir(parents=True)
    files = []
    for number in range(parts):
        path = data / f"part-{number}.{'csv.gz' if kind == 'CSV' else 'parquet'}"
        if kind == "CSV":
            lines = [",".join(f'"{_csv(value)}"' for value in row) for row in ROWS]
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        else:
            pq.write_table(_table(), path)
        files.append({"key": f"inv/data/{path.name}", "size": path.stat().st_size, "MD5checksum": md5(path)})
    manifest = folder / "inv" / "2026-11-30T00-00Z" / "manifest.json"
    manifest.parent.mkdir()
    shown = SCHEMA if kind == "CSV" else "message s3.inventory { required binary bucket (UTF8); }"
    about = {"sourceBucket": "photos", "destinationBucket": "arn:aws:s3:::lists", "version": "2016-11-30"}
    manifest.write_text(json.dumps({**about, "fileFormat": kind, "fileSchema": shown, "files": files}))
    return manifest


def _csv(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else ENCODED.get(str(value), str(value))


def _table() -> pa.Table:
    names = ["bucket", "key", "version_id", "is_latest", "is_delete_marker", "size", "last_modified_date", "e_tag"]
    columns = dict(zip(names, zip(*ROWS, strict=True), strict=True))
    moments = [datetime.fromisoformat(text) for text in columns["last_modified_date"]]
    return pa.table({**columns, "last_modified_date": pa.array(moments, pa.timestamp("ms", "UTC"))})


def md5(path: Path) -> str:
    """The checksum that a manifest holds."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_inventory_has_latest_versions_of_all_files(tmp_path: Path, kind: str) -> None:
    """Without older versions, delete markers and folders."""
    found = read(opened(write_inventory(tmp_path, kind)))
    shown = [(entry.reference, entry.version, entry.size, entry.modified) for entry in found]
    assert shown == KEPT * 3


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_inventory_goes_on_after_each_cursor(tmp_path: Path, kind: str) -> None:
    manifest = write_inventory(tmp_path, kind, parts=2)
    found = read(opened(manifest))
    for number, entry in enumerate(found, start=1):
        assert read(opened(manifest), entry.cursor) == found[number:]


def test_inventory_with_a_changed_file_is_refused(tmp_path: Path) -> None:
    manifest = write_inventory(tmp_path, "CSV")
    path = tmp_path / "inv" / "data" / "part-1.csv.gz"
    path.write_bytes(gzip.compress(b'"photos","other.jpg"'))
    with pytest.raises(SourceError, match="expected the MD5"):
        read(opened(manifest))


@pytest.mark.parametrize("broken", [b'"photos","b.jpg', b"\xff"], ids=["quote", "utf-8"])
def test_error_of_an_inventory_names_the_line(tmp_path: Path, broken: bytes) -> None:
    """And the file, of which an inventory has several."""
    manifest = write_inventory(tmp_path, "CSV", parts=1)
    path = tmp_path / "inv" / "data" / "part-0.csv.gz"
    path.write_bytes(gzip.compress(b'"photos","a.jpg"\n' + broken + b"\n"))
    about = json.loads(manifest.read_text())
    about["files"][0] |= {"size": path.stat().st_size, "MD5checksum": md5(path)}
    manifest.write_text(json.dumps(about))
    with pytest.raises(SourceError, match=r"part-0\.csv\.gz, line 2: expected CSV \("):
        read(opened(manifest))


@pytest.mark.parametrize(("kind", "message"), [("CSV", "expected CSV"), ("Parquet", "expected a Parquet file")])
def test_inventory_with_a_damaged_file_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    """Also where the manifest has no checksum of it."""
    manifest = write_inventory(tmp_path, kind, parts=1)
    written = json.loads(manifest.read_text())
    path = tmp_path / written["files"][0]["key"]
    raw = bytearray(path.read_bytes())
    raw[20:] = bytes(len(raw) - 20)
    path.write_bytes(raw)
    manifest.write_text(json.dumps(written | {"files": [{"key": f"inv/data/{path.name}"}]}))
    with pytest.raises(SourceError, match=message):
        read(opened(manifest))


@pytest.mark.parametrize(
    "change", [{"fileFormat": "ORC"}, {"fileSchema": "Bucket, Size"}, {"files": "none"}, {"files": [{"key": "gone"}]}]
)
def test_unusable_manifest_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = write_inventory(tmp_path, "CSV")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(SourceError, match="expected"):
        read(opened(manifest))


def test_parquet_column_has_references(tmp_path: Path) -> None:
    """Over several row groups, from each cursor, with a row that has none."""
    path = tmp_path / "list.parquet"
    urls = [f"s3://b/{number}.jpg" for number in range(9)]
    pq.write_table(pa.table({"url": [*urls, None], "other": range(10)}), path, row_group_size=4)
    found = read(opened(path, column="url"))
    assert [entry.reference for entry in found] == [*urls, ""]
    assert "expected a text" in found[-1].error
    assert opened(path).total(read=0, cursor="") == 10
    for number, entry in enumerate(found, start=1):
        assert read(opened(path, column="url"), entry.cursor) == found[number:]


@pytest.mark.parametrize("column", ["image", "other"])
def test_parquet_without_the_column_is_refused(tmp_path: Path, column: str) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["s3://b/a.jpg"]}), path)
    with pytest.raises(SourceError, match=f"expected the column {column}, got url"):
        read(opened(path, column=column))


def test_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    path.write_bytes(b"PAR1 or not")
    with pytest.raises(SourceError, match="expected a Parquet file"):
        read(opened(path))
