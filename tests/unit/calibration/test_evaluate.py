"""Precision, recall and false tags of a label set on images whose labels are known."""

from __future__ import annotations

import numpy as np
import pytest

from shiwu_worker.calibration import evaluate

WORDS = ("cat", "dog", "boat")
LIMITS = np.array([0.5, 0.5, 0.5])
COSINES = np.array(
    [
        [0.9, 0.1, 0.1],  # a cat, found
        [0.4, 0.6, 0.1],  # a cat, taken for a dog
        [0.1, 0.8, 0.1],  # a dog, found
        [0.6, 0.1, 0.2],  # no label: a false tag
        [0.1, 0.2, 0.3],  # no label: nothing
        [0.7, 0.7, 0.0],  # a cat and a dog, both found
    ],
    np.float32,
)
TRUTH = [{"cat"}, {"cat"}, {"dog"}, set(), {"tree"}, {"cat", "dog"}]


def test_shares_are_counted_by_label_and_over_all() -> None:
    found = evaluate(COSINES, WORDS, TRUTH, min_cosines=LIMITS)
    cat, dog, boat = found.labels
    assert (cat.images, dog.images, boat.images) == (3, 2, 0)
    assert cat.recall is not None
    assert cat.precision is not None
    assert (cat.recall.share, cat.precision.share) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert cat.taken_for == (("dog", 1),)
    assert (boat.recall, boat.precision, boat.average_precision) == (None, None, None)
    assert found.false_tags is not None
    assert found.kept is not None
    assert (found.false_tags.share, found.kept.share) == (0.5, pytest.approx(4 / 5))


def test_average_precision_ranks_all_images() -> None:
    """Cats rank 1st, 2nd and 4th of six by the cosine to `cat`: (1/1 + 2/2 + 3/4) / 3."""
    found = evaluate(COSINES, WORDS, TRUTH, min_cosines=LIMITS)
    assert found.labels[0].average_precision == pytest.approx((1 + 1 + 3 / 4) / 3)


def test_images_without_truth_give_no_shares() -> None:
    found = evaluate(np.empty((0, 3), np.float32), WORDS, [], min_cosines=LIMITS)
    assert (found.false_tags, found.kept) == (None, None)
