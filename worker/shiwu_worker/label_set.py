"""A label set: the labels that an image is compared with, and how their scores are made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from pydantic_core import to_json

from shiwu.contract import Head, LabelsInfo

DIGEST_CHARS: Final = 32
"""128 bits: a producer cannot choose two sets with one digest."""


@dataclass(frozen=True)
class LabelSet:
    """Labels in their order. Two sets are equal where all fields are, so a set is its own key in caches."""

    name: str | None
    words: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    head: Head = "softmax"

    def __hash__(self) -> int:
        """Computed once: every job looks its set up, and a set may hold many labels."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.words, self.templates, self.head))

    @cached_property
    def info(self) -> LabelsInfo:
        """What an answer says of the labels."""
        return LabelsInfo(name=self.name, digest=self._digest(), count=len(self.words), head=self.head)

    def _digest(self) -> str:
        # JSON tells ["a\nb"] from ["a", "b"]; texts that are merely joined would have one digest.
        fields = {"labels": self.words, "templates": self.templates, "head": self.head}
        return hashlib.sha256(to_json(fields)).hexdigest()[:DIGEST_CHARS]
