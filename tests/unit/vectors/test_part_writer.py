"""One part of kept vectors: its rows, row groups and format."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shiwu.contract import Answer, Status
from shiwu.parts import TargetError
from shiwu.vectors import COLUMNS, VECTOR
from shiwu.vectors.part_writer import GROUP_ROWS, MAX_WIDTH, VectorPartWriter, vector_bytes
from tests.support.vector_answers import WIDTH, answer_of, vector_of


def test_part_has_all_rows_in_groups_of_a_bounded_size(tmp_path: Path) -> None:
    """The memory of the writer is that of one row group; each vector is that of its answer."""
    writer = VectorPartWriter(tmp_path / "part.parquet", width=WIDTH)
    answer = answer_of(1)
    for number in range(GROUP_ROWS + 3):
        writer.add(answer, vector_of(number % 7).tobytes())
    writer.close()
    part = pq.ParquetFile(tmp_path / "part.parquet")
    groups = [part.metadata.row_group(n).num_rows for n in range(part.num_row_groups)]
    assert (writer.rows, groups) == (GROUP_ROWS + 3, [GROUP_ROWS, 3])
    assert part.schema_arrow.names == [*COLUMNS, VECTOR]
    assert part.schema_arrow.metadata[b"shiwu.vectors"] == b"1"
    found = part.read(["vector"]).column("vector")
    for number in (0, 5, GROUP_ROWS, GROUP_ROWS + 2):
        np.testing.assert_array_equal(np.array(found[number].as_py(), np.float16), vector_of(number % 7))


def test_part_of_an_answer_without_image_has_empty_texts(tmp_path: Path) -> None:
    """A column of texts has no nulls, so that every reader can compare it."""
    writer = VectorPartWriter(tmp_path / "part.parquet", width=WIDTH)
    writer.add(Answer("a", Status.TAGGED), vector_of(1).tobytes())
    writer.close()
    [row] = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert {name: row[name] for name in COLUMNS} == {"id": "a"} | dict.fromkeys(COLUMNS[1:], "")


@pytest.mark.parametrize("size", [0, 1, 3, 2 * MAX_WIDTH + 2], ids=str)
def test_vector_of_a_wrong_size_is_refused(size: int) -> None:
    """Whole numbers of two bytes, and not more than any model has."""
    answer = Answer("a", Status.TAGGED, vector=base64.b64encode(bytes(size)).decode())
    with pytest.raises(ValueError, match=f"got {size} bytes"):
        vector_bytes(answer)


def test_part_that_cannot_be_written_is_an_error_of_the_target(tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(TargetError, match=r"part\.parquet"):
        VectorPartWriter(tmp_path / "none" / "part.parquet", width=WIDTH)
