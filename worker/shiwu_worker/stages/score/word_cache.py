"""A cache of the text vectors of single labels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_vectors import EncodedWord

OVERHEAD_BYTES: Final = 512
"""Memory of an entry besides its vector: the key, the array's head, the tokens."""
Templates: TypeAlias = tuple[str, ...]


class WordCache:
    """Labels with their vectors, by templates and label. Thread-safe.

    Args:
        max_bytes: memory of the labels that are not pinned; the least recently used ones are dropped first.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pinned: dict[tuple[Templates, str], EncodedWord] = {}
        self._words: OrderedDict[tuple[Templates, str], EncodedWord] = OrderedDict()
        self._used_bytes = 0

    def find(self, templates: Templates, words: Iterable[str]) -> dict[str, EncodedWord]:
        """Those of the labels that are cached."""
        found: dict[str, EncodedWord] = {}
        with self._lock:
            for word in words:
                key = templates, word
                if (pinned := self._pinned.get(key)) is not None:
                    found[word] = pinned
                elif (cached := self._words.get(key)) is not None:
                    self._words.move_to_end(key)
                    found[word] = cached
        return found

    def add(self, templates: Templates, words: Mapping[str, EncodedWord]) -> None:
        """Keep these labels for a while."""
        with self._lock:
            for word, encoded in words.items():
                key = templates, word
                if key not in self._pinned and key not in self._words:
                    self._words[key] = encoded
                    self._used_bytes += _bytes_of(encoded)
            while self._used_bytes > self._max_bytes and self._words:
                _, dropped = self._words.popitem(last=False)
                self._used_bytes -= _bytes_of(dropped)

    def pin(self, templates: Templates, words: Mapping[str, EncodedWord]) -> None:
        """Keep these labels forever."""
        with self._lock:
            for word, encoded in words.items():
                key = templates, word
                self._pinned[key] = encoded
                if (cached := self._words.pop(key, None)) is not None:
                    self._used_bytes -= _bytes_of(cached)


def _bytes_of(encoded: EncodedWord) -> int:
    return encoded.vector.nbytes + OVERHEAD_BYTES
