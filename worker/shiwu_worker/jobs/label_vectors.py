"""Label sets with the text vectors of their labels, as scoring needs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from shiwu.contract import AnswerWarning, LabelsInfo
from shiwu_worker.jobs.label_checks import LabelFindings, LabelTokens
from shiwu_worker.jobs.label_set import LabelSet

if TYPE_CHECKING:
    from numpy.typing import NDArray


class EncodedWord(NamedTuple):
    """What the model makes of one label in its templates."""

    vector: NDArray[np.float32]
    """Unit vector (d)."""
    tokens: LabelTokens


@dataclass(frozen=True, eq=False)
class TextVectors:
    """What the model makes of labels in templates; sets that differ in their name or head share it."""

    vectors: NDArray[np.float32]
    """Unit vectors (m, d); in a set of version 2 one for each text."""
    findings: LabelFindings = field(default_factory=LabelFindings)


@dataclass(frozen=True, eq=False)
class EncodedLabels:
    """A label set with all that scoring needs. Jobs with equal label sets share one object."""

    label_set: LabelSet
    texts: TextVectors
    warnings: tuple[AnswerWarning, ...] = ()
    """What every answer with tags of this label set warns of."""
    is_calibrated: bool | None = None
    """Whether the limits were chosen for this revision of the model; None where they were not chosen from images."""

    @cached_property
    def info(self) -> LabelsInfo:
        """What an answer says of the labels."""
        if self.is_calibrated is None:
            return self.label_set.info
        return msgspec.structs.replace(self.label_set.info, calibrated=self.is_calibrated)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Unit vectors (m, d) of the labels; in a set of version 2 one for each text."""
        return self.texts.vectors

    @property
    def row_words(self) -> tuple[str, ...]:
        """The label of each row of `vectors`."""
        rules = self.label_set.rules
        if rules is None:
            return self.label_set.words
        return tuple(word for word, texts in zip(self.label_set.words, rules.phrases, strict=True) for _ in texts)

    def best_of_texts(self, cosines: NDArray[np.float32]) -> NDArray[np.float32]:
        """The cosines of the labels (n, m), from those of all texts."""
        rules = self.label_set.rules
        if rules is None or (starts := rules.tables.starts) is None:
            return cosines
        best: NDArray[np.float32] = np.maximum.reduceat(cosines, starts, axis=1)
        return best

    @cached_property
    def min_cosines(self) -> NDArray[np.float64] | None:
        """The least cosine of a tag, (1, m), or None where the label set has no bound."""
        least = self.label_set.min_cosines
        return None if least is None else np.array([least], np.float64)
