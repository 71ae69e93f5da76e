"""Parts of kept vectors, block by block; parts that cannot be used are refused with what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.retag.vector_parts import Origin, VectorParts
from tests.support.vector_parts import made_vectors, write_part

OURS: dict[str, Any] = {"model": "m", "revision": "r1"}
WIDTH = 8


def test_blocks_hold_all_rows_in_order(tmp_path: Path) -> None:
    """Of several parts in folders of folders, in blocks of at most so many rows."""
    (tmp_path / "day").mkdir()
    vectors = made_vectors(25, WIDTH)
    write_part(tmp_path / "a.parquet", vectors[:20], **OURS)
    write_part(tmp_path / "day" / "b.parquet", vectors[20:], first=20, **OURS)
    (tmp_path / ".c.parquet.tmp").write_bytes(b"half a part")
    parts = VectorParts(str(tmp_path))
    blocks = list(parts.blocks(rows=7))
    assert (len(parts), parts.origins) == (25, {Origin("m", "r1"): 25})
    assert [len(block.vectors) for block in blocks] == [7, 7, 6, 5]
    np.testing.assert_array_equal(np.concatenate([block.vectors for block in blocks]), vectors)
    assert [name for block in blocks for name in block.texts["id"]] == [f"id-{n}" for n in range(25)]


def test_vectors_of_other_models_are_left_out_on_request(tmp_path: Path) -> None:
    """Also where a part holds both."""
    ours = write_part(tmp_path / "a.parquet", made_vectors(3, WIDTH), **OURS)
    theirs = write_part(tmp_path / "b.parquet", made_vectors(2, WIDTH), model="m", revision="r2", first=3)
    both = pa.concat_tables([pq.read_table(path) for path in (theirs, ours)])
    pq.write_table(both, tmp_path / "c.parquet")
    parts = VectorParts(str(tmp_path))
    assert parts.origins == {Origin("m", "r1"): 6, Origin("m", "r2"): 4}
    kept = [name for block in parts.blocks(rows=100, only=Origin("m", "r1")) for name in block.texts["id"]]
    assert kept == ["id-0", "id-1", "id-2"] * 2


def damaged(path: Path, name: str) -> None:
    """Write a part with one defect."""
    write_part(path, made_vectors(3, WIDTH), **OURS)
    table = pq.read_table(path)
    vectors = table.column("vector").combine_chunks()
    place = table.schema.get_field_index("vector")
    if name == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    elif name == "no sha256":
        pq.write_table(table.drop_columns(["sha256"]), path)
    elif name == "float32":
        pq.write_table(table.set_column(place, "vector", vectors.cast(pa.list_(pa.float32(), WIDTH))), path)
    elif name == "null":
        mask = pa.array([False, True, False])
        nulled = pa.FixedSizeListArray.from_arrays(vectors.flatten(), WIDTH, mask=mask)
        pq.write_table(table.set_column(place, "vector", nulled), path)
    else:
        numbers = vectors.flatten().to_numpy(zero_copy_only=False).copy()
        numbers[5] = {"nan": np.nan, "long": 2.0}[name]
        array = pa.FixedSizeListArray.from_arrays(pa.array(numbers), WIDTH)
        pq.write_table(table.set_column(place, "vector", array), path)


@pytest.mark.parametrize(
    ("defect", "text"),
    [
        ("cut off", "expected a Parquet file that can be read"),
        ("no sha256", "expected a column sha256 of texts, got none"),
        ("float32", "expected a column vector of lists of float16"),
        ("null", "expected a vector in every row, got null"),
        ("nan", "expected unit vectors"),
        ("long", "expected unit vectors"),
    ],
)
def test_part_with_a_defect_is_refused(tmp_path: Path, defect: str, text: str) -> None:
    """The error names the file."""
    path = tmp_path / "a.parquet"
    damaged(path, defect)
    with pytest.raises(FatalError, match=text) as caught:
        list(VectorParts(str(tmp_path)).blocks(rows=10))
    assert caught.value.exit_code is ExitCode.CONFIG
    assert str(path) in str(caught.value)


def test_folder_without_parts_is_refused(tmp_path: Path) -> None:
    """The error names what writes parts."""
    with pytest.raises(FatalError, match="shiwu vectors sink"):
        VectorParts(str(tmp_path))
