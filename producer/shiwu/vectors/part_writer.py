"""Writes vectors of answers into a part."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shiwu.contract import Answer
from shiwu.parts import TargetError
from shiwu.vectors.part_format import COLUMNS, part_schema

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS: Final = 8192
"""Rows of one row group, and in memory before they are written."""
NUMBER_BYTES: Final = 2
MAX_WIDTH: Final = 16_384
"""Numbers of a vector; no dual encoder has more than some thousands."""


def vector_bytes(answer: Answer) -> bytes | None:
    """The float16 numbers of the vector of an answer, little-endian, or None where it has none.

    Raises:
        ValueError: its field `vector` holds something else.
    """
    if answer.vector is None:
        return None
    try:
        raw = base64.b64decode(answer.vector, validate=True)
    except binascii.Error as error:
        raise ValueError(f"expected a vector in base64 ({error})") from None
    if len(raw) % NUMBER_BYTES or not 0 < len(raw) <= MAX_WIDTH * NUMBER_BYTES:
        raise ValueError(f"expected 1 to {MAX_WIDTH} numbers of two bytes, got {len(raw)} bytes")
    return raw


class VectorPartWriter:
    """A part that is being written. Used by one thread.

    Args:
        path: a file, which is replaced.
        width: numbers of each vector.

    Raises:
        TargetError: the file cannot be written; so does each method.
    """

    def __init__(self, path: Path, *, width: int) -> None:
        import pyarrow.parquet as pq  # noqa: PLC0415 an extra

        self.path = path
        self.width = width
        self.rows = 0
        self._schema = part_schema(width)
        self._texts: dict[str, list[str]] = {name: [] for name in COLUMNS}
        self._numbers = bytearray()
        try:
            # Vectors do not get smaller by compression, and other columns hardly matter.
            self._writer = pq.ParquetWriter(
                path, self._schema, compression="none", use_dictionary=["model", "revision", "dtype", "device"]
            )
        except OSError as error:
            raise _failed(path, error) from None

    def add(self, answer: Answer, vector: bytes) -> None:
        """Add one row."""
        image, model = answer.image, answer.model
        values = {
            "id": answer.id,
            "reference": image.reference if image else "",
            "sha256": (image.sha256 if image else None) or "",
            "model": model.id if model else "",
            "revision": model.revision if model else "",
            "dtype": model.dtype if model else "",
            "device": model.device if model else "",
        }
        for name, value in values.items():
            self._texts[name].append(value)
        self._numbers += vector
        self.rows += 1
        if len(self._texts["id"]) >= GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Complete the file."""
        if self._texts["id"]:
            self._flush()
        try:
            self._writer.close()
        except OSError as error:
            raise _failed(self.path, error) from None

    def _flush(self) -> None:
        import pyarrow as pa  # noqa: PLC0415 an extra

        numbers = pa.Array.from_buffers(
            pa.float16(), len(self._numbers) // NUMBER_BYTES, [None, pa.py_buffer(bytes(self._numbers))]
        )
        arrays: list[pa.Array] = [pa.array(self._texts[name], pa.string()) for name in COLUMNS]
        arrays.append(pa.FixedSizeListArray.from_arrays(numbers, self.width))
        try:
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        except OSError as error:
            raise _failed(self.path, error) from None
        self._texts = {name: [] for name in COLUMNS}
        self._numbers = bytearray()


def _failed(path: Path, error: OSError) -> TargetError:
    return TargetError(f"{path}: {error.strerror or error}")
