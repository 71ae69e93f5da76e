"""The objects below a prefix of a bucket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

from shiwu.backfill.entries import Entry
from shiwu.parts import Objects, SourceError, WrongSource, split_address

JOIN_S: Final = 2.0


class BucketSource:
    """The objects of s3://bucket/prefix/, in the order of their keys. The cursor is the last key.

    Objects without bytes whose keys end with a slash are folders of consoles, and no entries.
    """

    has_times = True
    is_unique = True

    def __init__(self, objects: Objects, address: str) -> None:
        self.bucket, self._prefix = split_address(address)
        if self._prefix and not self._prefix.endswith("/"):
            raise WrongSource(f"expected a prefix that ends with a slash, got {address!r:.200}; write {address}/")
        self._objects = objects
        self._counter: _Counter | None = None

    def entries(self, cursor: str) -> Iterator[Entry]:
        """Yield the objects after the cursor."""
        for page in self._objects.pages(self.bucket, self._prefix, after=cursor):
            for found in page:
                if found.size or not found.key.endswith("/"):
                    yield Entry(found.key, f"s3://{self.bucket}/{found.key}", found.etag, found.size, found.modified)

    def total(self, *, read: int, cursor: str) -> int | None:
        """The number of objects, once a second listing beside the first has counted them."""
        if self._counter is None:
            self._counter = _Counter(self._objects, self.bucket, self._prefix)
        return self._counter.found

    def close(self) -> None:
        """End the count."""
        if self._counter is not None:
            self._counter.stop()


class _Counter:
    """Counts the objects of a prefix in a thread of its own."""

    def __init__(self, objects: Objects, bucket: str, prefix: str) -> None:
        self.found: int | None = None
        self._stop = threading.Event()
        self._pages = objects.copy().pages(bucket, prefix, after="")
        self._thread = threading.Thread(target=self._count, name="backfill-count", daemon=True)
        self._thread.start()

    def _count(self) -> None:
        count = 0
        try:
            for page in self._pages:
                count += sum(1 for found in page if found.size or not found.key.endswith("/"))
                if self._stop.is_set():
                    return
        except SourceError:
            return  # the first listing meets the same error, and reports it
        self.found = count

    def stop(self) -> None:
        """Let the thread end after its page."""
        self._stop.set()
        self._thread.join(timeout=JOIN_S)
