"""Kept vectors: the Parquet parts in which the vectors of answers are stored.

Needs the extra `vectors` (pyarrow, obstore), which is imported inside functions.
"""

from __future__ import annotations

from shiwu.vectors.part_format import COLUMNS, VECTOR, part_schema

__all__ = ["COLUMNS", "VECTOR", "part_schema"]
