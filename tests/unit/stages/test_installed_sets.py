"""Label sets that replace others in a label bank while the worker runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from shiwu_worker.errors import Rejected
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support.rule_sets import text_vector


class Tower:
    """A text tower that counts its texts."""

    def __init__(self) -> None:
        self.count = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector for each text."""
        self.count += len(texts)
        return np.stack([text_vector(text) for text in texts])

    def tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """A token for each letter."""
        return [LabelTokens(tuple(map(ord, label)), is_readable=True) for label in labels]


def make_bank(tower: Tower, *, max_bytes: int = 1 << 20) -> LabelBank:
    """A bank with two sets, the first of which is the default."""
    sets = {"six": LabelSet("six", ("a", "b")), "other": LabelSet("other", ("x", "y"))}
    return LabelBank(
        sets=sets,
        default="six",
        encode_texts=tower.encode,
        label_tokens=tower.tokens,
        max_cached=1,
        max_bytes=max_bytes,
        has_bias=True,
    )


def test_installed_sets_replace_the_former_ones() -> None:
    """Requests get the new sets; jobs that have a former set find its vectors, and nothing is encoded again."""
    tower = Tower()
    bank = make_bank(tower)
    old = bank.resolve("six")
    former = bank.encoded(old)
    new = LabelSet("six", ("a", "b", "c"))
    encoded = bank.encoded(new)
    assert tower.count == 3
    bank.install({**bank.sets, "six": new}, [encoded])
    assert bank.resolve("six") == bank.resolve(None) == new
    assert bank.known(bank.resolve("six")) is encoded
    assert bank.known(bank.resolve("six", "sigmoid")) is not None
    assert bank.known(old) is former
    assert {label_set.words for label_set in bank.configured} == {new.words, ("x", "y")}
    bank.install({"other": bank.sets["other"]}, [])
    with pytest.raises(Rejected, match="expected one of other, got 'six'"):
        bank.resolve("six")
    assert tower.count == 3


def test_vectors_of_removed_sets_are_not_kept_forever() -> None:
    """They are dropped like those of requests when memory runs out."""
    bank = make_bank(Tower(), max_bytes=0)
    old = bank.encoded(bank.resolve("six")).label_set
    bank.install({"other": bank.sets["other"]}, [])
    for word in ("p", "q"):
        bank.encoded(LabelSet(None, (word,)))
    assert bank.known(old) is None
    assert not bank.cached_words(old)
