"""Kept vectors: `shiwu vectors sink`, and the Parquet parts in which it stores the vectors of answers.

Needs the extra `vectors`, whose libraries are imported inside functions.
"""

from __future__ import annotations

from shiwu.vectors.part_format import COLUMNS, VECTOR, part_schema

__all__ = ["COLUMNS", "VECTOR", "part_schema"]
