"""A label set: the labels that an image is compared with, and how their scores are made."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias

from pydantic_core import to_json

from shiwu.contract import Head, LabelsInfo, Tag
from shiwu_worker.jobs.label_rules import LabelRules, Phrase

DIGEST_CHARS: Final = 32
"""128 bits: a producer cannot choose two sets with one digest."""
SetHead: TypeAlias = Head | Literal["z"]
"""How a label set decides: by its scores, or by how far a cosine exceeds that of images without the label."""


@dataclass(frozen=True)
class LabelSet:
    """Labels in their order. Two sets are equal where all fields are, so a set is its own key in caches."""

    name: str | None
    words: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    head: SetHead = "softmax"
    scale: float | None = None
    """Factor of the cosine, in place of the model's."""
    bias: float | None = None
    """Added to the scaled cosine, in place of the model's. With a bias a set may use sigmoid with any model."""
    min_cosines: tuple[float, ...] | None = None
    """The least cosine of a tag, label by label; a request may bring its own."""
    calibrated_for: str | None = None
    """Revision of the model that these limits were chosen for; None where they were written by hand."""
    rules: LabelRules | None = None
    """What a set of version 2 has; None for version 1 and for labels of a request."""

    def __hash__(self) -> int:
        """Computed once: every job looks its set up, and a set may hold many labels."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.words, self.templates, self.head, self.scale, self.bias, self.min_cosines))

    @cached_property
    def info(self) -> LabelsInfo:
        """What an answer says of the labels."""
        calibration = None if self.rules is None else self.rules.calibration
        return LabelsInfo(
            name=self.name,
            digest=self._digest(),
            count=len(self.words),
            head=self.head,
            calibration=None if calibration is None else calibration.digest,
        )

    @property
    def phrases(self) -> tuple[Phrase, ...]:
        """The texts that the model encodes, in the order of the rows of their vectors."""
        if self.rules is None:
            return tuple((self.templates, word) for word in self.words)
        return tuple(phrase for each in self.rules.phrases for phrase in each)

    @cached_property
    def text_key(self) -> Hashable:
        """What the vectors of the labels depend on."""
        return (self.templates, self.words) if self.rules is None else (self.rules.phrases, self.words)

    def is_unknown(self, tags: Sequence[Tag] | None) -> bool:
        """Whether the only tag is the one that this set gives where no label passes."""
        if self.rules is None or self.rules.unknown is None or not tags:
            return False
        return tags[0].label == self.words[self.rules.unknown]

    def _digest(self) -> str:
        # JSON tells ["a\nb"] from ["a", "b"]; texts that are merely joined would have one digest.
        fields: dict[str, object] = {"labels": self.words, "templates": self.templates, "head": self.head}
        more = {"scale": self.scale, "bias": self.bias, "min_cosines": self.min_cosines}
        fields |= {name: value for name, value in more.items() if value is not None}
        if self.rules is not None:
            del fields["templates"]  # each text has its own
            fields |= {"version": 2, **self.rules.digest_fields()}
        return hashlib.sha256(to_json(fields)).hexdigest()[:DIGEST_CHARS]
