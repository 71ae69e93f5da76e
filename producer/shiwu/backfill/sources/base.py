"""What all sources have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from shiwu.backfill.entries import Entry


class Source(Protocol):
    """A list of images that can be read again from a cursor. Used by one thread."""

    has_times: bool
    """Whether entries have a time of change."""
    is_unique: bool
    """Whether no image can come twice."""

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the entries after the cursor, "" for all of them.

        Raises:
            SourceError: the source cannot be read.
        """

    def total(self, *, read: int, cursor: str) -> int | None:
        """How many entries the source has, where that is known or can be estimated.

        Args:
            read: entries that were read up to the cursor.
        """

    def close(self) -> None:
        """Close what is open, and remove temporary files."""


class NoSource:
    """A source that is empty, where nothing more is to be read."""

    has_times = True
    is_unique = True

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield nothing."""
        return iter(())

    def total(self, *, read: int, cursor: str) -> int | None:
        """What was read before."""
        return read

    def close(self) -> None:
        """Do nothing."""
