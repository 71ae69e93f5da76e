"""Reads parts of kept vectors block by block, so that any number of them takes the memory of one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from shiwu.parts import Objects, SourceError, TargetError
from shiwu.vectors import COLUMNS, VECTOR
from shiwu_worker.errors import ExitCode, FatalError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

S3: Final = "s3://"
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
    """All parts of a folder or below s3://bucket/prefix/, or one file.

    Raises:
        FatalError: with ExitCode.CONFIG, there is no part, or one that cannot be read or has other columns.
    """

    def __init__(self, place: str) -> None:
        self._objects = Objects()
        self._paths = self._find(place)
        if not self._paths:
            raise _wrong(place, f"expected parts of vectors (*{SUFFIX}), got none; `shiwu vectors sink` writes them")
        self.origins: dict[Origin, int] = {}
        """The models of all rows, with the number of their rows."""
        for part in self._paths:
            self._scan(part)

    def _find(self, place: str) -> list[str]:
        if not place.startswith(S3):
            path = Path(place)
            return sorted(map(str, path.glob(f"**/*{SUFFIX}"))) if path.is_dir() else [place]
        if place.endswith(SUFFIX):
            return [place]
        prefix = f"{place.rstrip('/')}/"
        try:
            return sorted(f"{prefix}{name}" for name in self._objects.names(prefix) if name.endswith(SUFFIX))
        except (SourceError, TargetError) as error:
            raise _wrong(place, str(error)) from error

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
            with self._open(path) as part:
                for batch in _batches(path, part, rows=rows, columns=[*COLUMNS, VECTOR]):
                    block = _block(path, batch)
                    if only is not None:
                        block = _only(block, only)
                    if len(block.vectors):
                        yield block

    @contextmanager
    def _open(self, path: str) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa  # noqa: PLC0415 an extra
        import pyarrow.parquet as pq  # noqa: PLC0415 an extra

        with ExitStack() as stack:
            with _errors(path):
                source: Any = path
                if path.startswith(S3):
                    source = pa.PythonFile(stack.enter_context(self._objects.open(path)), mode="r")
                # Row groups are read as they come: with a buffer ahead, a part of another program may take all memory.
                part = pq.ParquetFile(source, memory_map=source is path, pre_buffer=False)
            yield stack.enter_context(part)

    def _scan(self, path: str) -> None:
        with self._open(path) as part:
            _check_columns(path, part.schema_arrow)
            for batch in _batches(path, part, rows=SCANNED_ROWS, columns=list(Origin._fields)):
                models, revisions = (batch.column(name).to_pylist() for name in Origin._fields)
                for model, revision in zip(models, revisions, strict=True):
                    origin = Origin(str(model), str(revision))
                    self.origins[origin] = self.origins.get(origin, 0) + 1


def _wrong(path: str, text: str) -> FatalError:
    return FatalError(ExitCode.CONFIG, f"{path}: {text}")


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """Convert errors of the file, the store and the format."""
    import pyarrow as pa  # noqa: PLC0415 an extra

    try:
        yield
    except (OSError, pa.ArrowException, SourceError) as error:
        raise _wrong(path, f"expected a Parquet file that can be read ({error!s:.200})") from error


def _batches(path: str, part: pq.ParquetFile, *, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    batches = part.iter_batches(rows, columns=list(columns))
    while True:
        with _errors(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _check_columns(path: str, schema: pa.Schema) -> None:
    import pyarrow as pa  # noqa: PLC0415 an extra

    for name in COLUMNS:
        if name not in schema.names or schema.field(name).type != pa.string():
            found = schema.field(name).type if name in schema.names else "none"
            raise _wrong(path, f"expected a column {name} of texts, got {found}; see docs/vectors.md")
    kind = schema.field(VECTOR).type if VECTOR in schema.names else None
    if not isinstance(kind, pa.FixedSizeListType) or kind.value_type != pa.float16():
        raise _wrong(path, f"expected a column {VECTOR} of lists of float16 with one length, got {kind}")


def _block(path: str, batch: pa.RecordBatch) -> VectorBlock:
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
