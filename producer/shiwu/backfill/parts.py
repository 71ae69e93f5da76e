"""Writes answers as files of results: JSON lines or Parquet."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from shiwu.backfill.plan import OutputFormat
from shiwu.contract import Answer

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS: Final = 5_000
"""Rows of one row group in Parquet, and in memory before they are written."""


class PartWriter(Protocol):
    """A file that is being written."""

    path: Path
    rows: int

    def add(self, answer: Answer) -> None:
        """Add one row."""

    def close(self) -> None:
        """Complete the file."""


def open_part(path: Path, kind: OutputFormat) -> PartWriter:
    """A new file, which replaces an incomplete one of this name."""
    return ParquetWriter(path) if kind == "parquet" else JsonWriter(path)


def digest_of(path: Path) -> tuple[int, str]:
    """The size of a file in bytes, and its SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


class JsonWriter:
    """One answer a line, as `shiwu results` prints them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._file = path.open("wb")

    def add(self, answer: Answer) -> None:
        """Add one line."""
        self._file.write(answer.to_json() + b"\n")
        self.rows += 1

    def close(self) -> None:
        """Complete the file."""
        self._file.close()


class ParquetWriter:
    """One row an answer, compressed by zstd; `tags` is a list of structs, `metadata` is JSON."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq  # noqa: PLC0415 an extra

        self.path = path
        self.rows = 0
        self._schema = _schema()
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[dict[str, Any]] = []

    def add(self, answer: Answer) -> None:
        """Add one row."""
        self._waiting.append(row_of(answer))
        self.rows += 1
        if len(self._waiting) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 an extra

        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self._schema))
        self._waiting = []

    def close(self) -> None:
        """Complete the file."""
        if self._waiting:
            self._flush()
        self._writer.close()


def _schema() -> pa.Schema:
    import pyarrow as pa  # noqa: PLC0415 an extra

    tag = pa.struct([("label", pa.string()), ("score", pa.float32()), ("cosine", pa.float32())])
    texts = ("id", "status", "reference", "sha256", "format")
    last = ("error_code", "error_message", "error_stage", "labels", "labels_digest", "model", "model_revision")
    return pa.schema(
        [
            *((name, pa.string()) for name in texts),
            *((name, pa.int64()) for name in ("width", "height", "bytes")),
            ("tags", pa.list_(tag)),
            *((name, pa.string()) for name in last),
            ("attempts", pa.int32()),
            ("total_ms", pa.float32()),
            ("worker", pa.string()),
            ("answered_at", pa.timestamp("us", tz="UTC")),
            ("metadata", pa.string()),
            ("embedding", pa.list_(pa.float32())),
            ("vector", pa.string()),
        ]
    )


def row_of(answer: Answer) -> dict[str, Any]:
    """The columns of one answer."""
    image, error, labels, model = answer.image, answer.error, answer.labels, answer.model
    return {
        "id": answer.id,
        "status": str(answer.status),
        "reference": image.reference if image else None,
        "sha256": image.sha256 if image else None,
        "format": image.format if image else None,
        "width": image.width if image else None,
        "height": image.height if image else None,
        "bytes": image.bytes if image else None,
        "tags": None
        if answer.tags is None
        else [{"label": tag.label, "score": tag.score, "cosine": tag.cosine} for tag in answer.tags],
        "error_code": str(error.code) if error else None,
        "error_message": error.message if error else None,
        "error_stage": str(error.stage) if error and error.stage else None,
        "labels": labels.name if labels else None,
        "labels_digest": labels.digest if labels else None,
        "model": model.id if model else None,
        "model_revision": model.revision if model else None,
        "attempts": answer.attempts,
        "total_ms": answer.timing.total,
        "worker": answer.worker,
        "answered_at": answer.answered_at,
        "metadata": None if answer.metadata is None else msgspec.json.encode(answer.metadata).decode(),
        "embedding": None if answer.embedding is None else list(answer.embedding),
        "vector": answer.vector,
    }
