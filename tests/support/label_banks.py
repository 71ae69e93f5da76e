"""A label bank whose text vectors depend on the texts only."""

from __future__ import annotations

import numpy as np

from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support.rule_sets import text_vector


def make_bank(*sets: LabelSet, has_vectors: bool = True, revision: str | None = None) -> LabelBank:
    """A bank of these sets; the first is the default."""
    bank = LabelBank(
        sets={str(each.name): each for each in sets},
        default=str(sets[0].name),
        encode_texts=lambda texts: np.stack([text_vector(text) for text in texts]),
        label_tokens=lambda labels: [LabelTokens(tuple(map(ord, label)), is_readable=True) for label in labels],
        max_cached=4,
        has_bias=False,
        revision=revision,
    )
    for each in sets if has_vectors else ():
        bank.encoded(each)
    return bank
