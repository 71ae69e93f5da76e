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
    scale: float | None = None
    """Factor of the cosine, in place of the model's."""
    bias: float | None = None
    """Added to the scaled cosine, in place of the model's. With a bias a set may use sigmoid with any model."""
    min_cosines: tuple[float, ...] | None = None
    """The least cosine of a tag, label by label; a request may bring its own."""
    calibrated_for: str | None = None
    """Revision of the model that these limits were chosen for; None where they were written by hand."""

    def __hash__(self) -> int:
        """Computed once: every job looks its set up, and a set may hold many labels."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.words, self.templates, self.head, self.scale, self.bias, self.min_cosines))

    @cached_property
    def info(self) -> LabelsInfo:
        """What an answer says of the labels."""
        return LabelsInfo(name=self.name, digest=self._digest(), count=len(self.words), head=self.head)

    def _digest(self) -> str:
        # JSON tells ["a\nb"] from ["a", "b"]; texts that are merely joined would have one digest.
        fields: dict[str, object] = {"labels": self.words, "templates": self.templates, "head": self.head}
        more = {"scale": self.scale, "bias": self.bias, "min_cosines": self.min_cosines}
        fields |= {name: value for name, value in more.items() if value is not None}
        return hashlib.sha256(to_json(fields)).hexdigest()[:DIGEST_CHARS]
