"""Splits long lists, so that no command to Redis and no batch of texts becomes too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in slices of at most `size`; the last slice may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
