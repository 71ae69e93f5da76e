"""The columns of a part of vectors. Readers find columns by name, so that a newer version may add some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pyarrow as pa

VECTOR: Final = "vector"
COLUMNS: Final = ("id", "reference", "sha256", "model", "revision", "dtype", "device")
"""The columns of texts; the vector stands beside them. `sha256` and `reference` are of the image."""
FORMAT: Final = {b"shiwu.vectors": b"1"}
"""The metadata of the file, with the version of the format."""


def part_schema(width: int) -> pa.Schema:
    """The schema of a part whose vectors have `width` numbers: float16, as in the answers."""
    import pyarrow as pa  # noqa: PLC0415 an extra

    texts = [pa.field(name, pa.string()) for name in COLUMNS]
    return pa.schema([*texts, pa.field(VECTOR, pa.list_(pa.float16(), width))], metadata=FORMAT)
