"""Sources with columns: Parquet files. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shiwu.backfill.entries import Entry
from shiwu.parts import SourceError

ROWS: Final = 2000
"""Rows that are read at a time."""


class ParquetFile:
    """One column of a Parquet file, with a reference in each row. The cursor is the number of rows."""

    has_times = False
    is_unique = False

    def __init__(self, path: Path, *, column: str) -> None:
        self._path = path
        self._column = column
        self._total: int | None = None

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the entries after the cursor."""
        number = int(cursor or 0)
        for row in parquet_rows(self._path, [self._column], after=number):
            number += 1
            reference = row[self._column]
            if isinstance(reference, str):
                yield Entry(str(number), reference)
            else:
                error = f"expected a text in the column {self._column}, got {reference!r:.80}"
                yield Entry(str(number), "", version=f"row {number}", error=error)

    def total(self, *, read: int, cursor: str) -> int | None:
        """The number of rows."""
        if self._total is None:
            self._total = count_rows(self._path)
        return self._total

    def close(self) -> None:
        """Do nothing: the file is open while it is read."""


def parquet_rows(path: Path, columns: Sequence[str], *, after: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file after the first `after` ones, as column → value; other columns are not read.

    Raises:
        SourceError: it is no Parquet file, or lacks a column.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 an extra, and a tenth of a second

    with _parquet_errors(path), pq.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        if missing := [name for name in columns if name not in names]:
            raise SourceError(
                f"{path}: expected the column {missing[0]}, got {', '.join(sorted(names))}; name it with --column"
            )
        groups: list[int] = []
        for index in range(file.num_row_groups):
            count = file.metadata.row_group(index).num_rows
            if groups or after < count:
                groups.append(index)
            else:
                after -= count
        for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=list(columns)):
            rows = batch.to_pylist()
            yield from rows[after:]
            after = max(0, after - len(rows))


def column_names(path: Path) -> set[str]:
    """The names of the columns of a Parquet file.

    Raises:
        SourceError: it is none.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 an extra

    with _parquet_errors(path):
        return set(pq.read_schema(path).names)


def count_rows(path: Path) -> int:
    """The number of rows of a Parquet file.

    Raises:
        SourceError: it is none.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 an extra

    with _parquet_errors(path):
        return int(pq.read_metadata(path).num_rows)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa  # noqa: PLC0415 an extra

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: expected a Parquet file ({error})") from None
