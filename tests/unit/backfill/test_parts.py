"""Files of results: the rows of both formats."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shiwu.backfill.parts import GROUP_ROWS, digest_of, open_part
from shiwu.backfill.plan import OutputFormat
from shiwu.contract import Answer, ErrorCode, ErrorInfo, Stage, Status, moment
from tests.support.backfills import json_rows, parquet_rows


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_vectors_are_kept_in_rows(tmp_path: Path, kind: OutputFormat) -> None:
    """As a request wants them."""
    part = open_part(tmp_path / "part", kind)
    part.add(Answer(id="a", status=Status.TAGGED, embedding=(0.5, -0.25), vector="AAAA", metadata={"n": "猫"}))
    part.close()
    [row] = json_rows(part.path) if kind == "jsonl" else parquet_rows(part.path)
    assert (row["embedding"], row["vector"]) == ([0.5, -0.25], "AAAA")
    assert row["metadata"] == ({"n": "猫"} if kind == "jsonl" else '{"n":"猫"}')


def test_parquet_has_row_groups_and_errors(tmp_path: Path) -> None:
    """Rows are written group by group, so that a part does not stay in memory."""
    part = open_part(tmp_path / "part.parquet", "parquet")
    error = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="gone", stage=Stage.FETCH)
    failed = Answer(id="a", status=Status.REJECTED, error=error, answered_at=moment(1.7e12))
    for _ in range(GROUP_ROWS + 1):
        part.add(failed)
    part.close()
    assert pq.read_metadata(part.path).num_row_groups == 2
    rows = parquet_rows(part.path)
    assert len(rows) == part.rows == GROUP_ROWS + 1
    assert (rows[0]["error_code"], rows[0]["error_stage"], rows[0]["tags"]) == ("source_not_found", "fetch", None)
    assert rows[0]["answered_at"] == moment(1.7e12)


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"abc")
    assert digest_of(path) == (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
