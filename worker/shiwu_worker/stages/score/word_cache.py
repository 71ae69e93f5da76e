"""A cache of the text vectors of single labels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_rules import Phrase
    from shiwu_worker.jobs.label_vectors import EncodedWord

OVERHEAD_BYTES: Final = 512
"""Memory of an entry besides its vector: the key, the array's head, the tokens."""


class WordCache:
    """Phrases with their vectors. Thread-safe.

    Args:
        max_bytes: memory of the phrases that are not pinned; the least recently used ones are dropped first.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pinned: dict[Phrase, EncodedWord] = {}
        self._words: OrderedDict[Phrase, EncodedWord] = OrderedDict()
        self._used_bytes = 0

    def find(self, phrases: Iterable[Phrase]) -> dict[Phrase, EncodedWord]:
        """Those of the phrases that are cached."""
        found: dict[Phrase, EncodedWord] = {}
        with self._lock:
            for phrase in phrases:
                if (pinned := self._pinned.get(phrase)) is not None:
                    found[phrase] = pinned
                elif (cached := self._words.get(phrase)) is not None:
                    self._words.move_to_end(phrase)
                    found[phrase] = cached
        return found

    def add(self, words: Mapping[Phrase, EncodedWord]) -> None:
        """Keep these phrases for a while."""
        with self._lock:
            self._add(words)

    def pin(self, words: Mapping[Phrase, EncodedWord]) -> None:
        """Keep these phrases until `pin_only` is called without them."""
        with self._lock:
            for phrase, encoded in words.items():
                self._pinned[phrase] = encoded
                if (cached := self._words.pop(phrase, None)) is not None:
                    self._used_bytes -= _bytes_of(cached)

    def pin_only(self, phrases: Collection[Phrase]) -> None:
        """Pin those of these phrases that are cached; what was pinned so far is kept for a while."""
        with self._lock:
            kept = {phrase: found for phrase in phrases if (found := self._pinned.pop(phrase, None)) is not None}
            for phrase in phrases:
                if (cached := self._words.pop(phrase, None)) is not None:
                    self._used_bytes -= _bytes_of(cached)
                    kept[phrase] = cached
            former, self._pinned = self._pinned, kept
            self._add(former)

    def _add(self, words: Mapping[Phrase, EncodedWord]) -> None:
        """The caller holds the lock."""
        for phrase, encoded in words.items():
            if phrase not in self._pinned and phrase not in self._words:
                self._words[phrase] = encoded
                self._used_bytes += _bytes_of(encoded)
        while self._used_bytes > self._max_bytes and self._words:
            _, dropped = self._words.popitem(last=False)
            self._used_bytes -= _bytes_of(dropped)


def _bytes_of(encoded: EncodedWord) -> int:
    return encoded.vector.nbytes + OVERHEAD_BYTES
