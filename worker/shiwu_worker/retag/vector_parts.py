"""Reads parts of kept vectors block by block, so that any number of them takes the memory of one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from shiwu.vectors import COLUMNS, VECTOR
from shiwu_worker.errors import ExitCode, FatalError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

SUFFIX: Final = ".parquet"
MAX_NORM_ERROR: Final = 0.01
"""Of unit vectors in float16; vectors with a larger one are of another kind or damaged."""
SCANNED_ROWS: Final = 65_536


class Origin(NamedTuple):
    """Which model made a vector."""

    model: str
    revision: str


@dataclass(frozen=True, slots=True)
class VectorBlock:
    """Some rows of a part."""

    texts: dict[str, list[str | None]]
    """The columns of `COLUMNS`."""
    vectors: NDArray[np.float16]
    """(n, d)."""


class VectorParts:
    """All parts of a folder, or one file.

    Raises:
        FatalError: with ExitCode.CONFIG, there is no part, or one that cannot be read or has other columns.
    """

    def __init__(self, path: Path) -> None:
        self._paths = sorted(path.glob(f"**/*{SUFFIX}")) if path.is_dir() else [path]
        if not self._paths:
            raise _wrong(path, f"expected parts of vectors (*{SUFFIX}), got none; `shiwu vectors sink` writes them")
        self.origins: dict[Origin, int] = {}
        """The models of all rows, with the number of their rows."""
        for part in self._paths:
            self._scan(part)

    def __len__(self) -> int:
        """How many rows all parts have."""
        return sum(self.origins.values())

    def blocks(self, *, rows: int, only: Origin | None = None) -> Iterator[VectorBlock]:
        """Yield the vectors of all parts, in the order of their names.

        Args:
            rows: most rows of a block.
            only: leave out the vectors of other models.

        Raises:
            FatalError: with ExitCode.CONFIG, when vectors are damaged.
        """
        for path in self._paths:
            with _open(path) as part:
                for batch in _batches(path, part, rows=rows, columns=[*COLUMNS, VECTOR]):
                    block = _block(path, batch)
                    if only is not None:
                        block = _only(block, only)
                    if len(block.vectors):
                        yield block

    def _scan(self, path: Path) -> None:
        with _open(path) as part:
            _check_columns(path, part.schema_arrow)
            for batch in _batches(path, part, rows=SCANNED_ROWS, columns=list(Origin._fields)):
                models, revisions = (batch.column(name).to_pylist() for name in Origin._fields)
                for model, revision in zip(models, revisions, strict=True):
                    origin = Origin(str(model), str(revision))
                    self.origins[origin] = self.origins.get(origin, 0) + 1


def _wrong(path: Path, text: str) -> FatalError:
    return FatalError(ExitCode.CONFIG, f"{path}: {text}")


def _open(path: Path) -> pq.ParquetFile:
    import pyarrow as pa  # noqa: PLC0415 an extra
    import pyarrow.parquet as pq  # noqa: PLC0415 an extra

    try:
        # Row groups are read as they come: with a buffer ahead, a part of another program may take all memory.
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise _wrong(path, f"expected a Parquet file that can be read ({error!s:.200})") from error


def _batches(path: Path, part: pq.ParquetFile, *, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa  # noqa: PLC0415 an extra

    try:
        yield from part.iter_batches(rows, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise _wrong(path, f"expected a Parquet file that can be read ({error!s:.200})") from error


def _check_columns(path: Path, schema: pa.Schema) -> None:
    import pyarrow as pa  # noqa: PLC0415 an extra

    for name in COLUMNS:
        if name not in schema.names or schema.field(name).type != pa.string():
            found = schema.field(name).type if name in schema.names else "none"
            raise _wrong(path, f"expected a column {name} of texts, got {found}; see docs/vectors.md")
    kind = schema.field(VECTOR).type if VECTOR in schema.names else None
    if not isinstance(kind, pa.FixedSizeListType) or kind.value_type != pa.float16():
        raise _wrong(path, f"expected a column {VECTOR} of lists of float16 with one length, got {kind}")


def _block(path: Path, batch: pa.RecordBatch) -> VectorBlock:
    column = batch.column(VECTOR)
    numbers = column.flatten()
    if column.null_count or numbers.null_count:
        raise _wrong(path, "expected a vector in every row, got null")
    vectors: NDArray[np.float16] = numbers.to_numpy(zero_copy_only=True).reshape(len(batch), column.type.list_size)
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    # NaN fails this comparison.
    if not (np.abs(norms - 1.0) <= MAX_NORM_ERROR).all():
        raise _wrong(path, "expected unit vectors, got others; the part is damaged, or another program made it")
    return VectorBlock({name: batch.column(name).to_pylist() for name in COLUMNS}, vectors)


def _only(block: VectorBlock, origin: Origin) -> VectorBlock:
    models, revisions = (block.texts[name] for name in Origin._fields)
    kept = [row for row, found in enumerate(zip(models, revisions, strict=True)) if found == origin]
    if len(kept) == len(models):
        return block
    return VectorBlock({name: [texts[row] for row in kept] for name, texts in block.texts.items()}, block.vectors[kept])
