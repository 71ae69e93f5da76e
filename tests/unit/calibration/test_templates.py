"""Templates are chosen on one half of the images and measured on the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shiwu_worker.calibration.evaluate import evaluate
from shiwu_worker.calibration.templates import (
    CANDIDATES,
    KnownImages,
    average_precisions,
    mean_vectors,
    quality,
    tune_templates,
)

LABELS = 6
WIDTH = 32
NOISY, CLEAR = "{}", "一张{}的照片"


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def known_images(
    seed: int, *, count: int = 240, sources: int = 12, noise: float = 1.2
) -> tuple[KnownImages, NDArray[np.float64]]:
    """Images near the direction of their one label, and the directions."""
    chance = np.random.default_rng(seed)
    directions = chance.standard_normal((LABELS, WIDTH))
    shown = chance.integers(LABELS, size=count)
    vectors = unit(directions[shown] + noise * chance.standard_normal((count, WIDTH)))
    names = [f"source-{number % sources}" for number in range(count)]
    return KnownImages(vectors, np.eye(LABELS, dtype=bool)[shown], names), directions


def test_the_template_that_names_labels_best_is_chosen() -> None:
    """And it is better on the images kept aside too."""
    images, directions = known_images(1)
    noise = np.random.default_rng(2).standard_normal((LABELS, WIDTH))
    labels = {NOISY: unit(directions + 3 * noise), CLEAR: unit(directions)}
    found = tune_templates(images, labels, own=[NOISY], seed=0)
    assert found.chosen.templates[0] == CLEAR
    assert found.is_better
    assert found.gained > found.lost
    assert found.chosen.aside.average_precision > found.own.aside.average_precision


def test_templates_that_fit_one_half_only_are_not_better() -> None:
    """A template that answers the first half by heart is chosen, and the other half shows that it does not help."""
    images, directions = known_images(3, noise=3.0)
    half, _, _ = images.halves(seed=0)
    by_heart = unit(np.stack([half.vectors[half.is_true[:, k]].sum(0) for k in range(LABELS)]).astype(np.float64))
    labels = {NOISY: unit(directions), CLEAR: by_heart}
    found = tune_templates(images, labels, own=[NOISY], seed=0)
    assert found.chosen.templates[0] == CLEAR
    assert not found.is_better


def test_no_source_is_in_both_halves() -> None:
    images, _ = known_images(4, sources=9)
    half, aside, is_by_source = images.halves(seed=5)
    assert is_by_source
    assert not set(half.sources) & set(aside.sources)
    assert len(half.vectors) + len(aside.vectors) == len(images.vectors)
    assert abs(len(half.vectors) - len(aside.vectors)) <= max(images.sources.count(name) for name in images.sources)


def test_one_source_is_divided_image_by_image() -> None:
    images, _ = known_images(6, sources=1)
    half, aside, is_by_source = images.halves(seed=0)
    assert not is_by_source
    assert len(half.vectors) == len(aside.vectors) == 120


def test_halves_without_labels_are_refused() -> None:
    images, directions = known_images(7)
    bare = KnownImages(images.vectors, np.zeros_like(images.is_true), images.sources)
    with pytest.raises(ValueError, match="in both halves"):
        tune_templates(bare, {NOISY: unit(directions)}, own=[NOISY], seed=0)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_average_precision_equals_that_of_eval(seed: int) -> None:
    """And does not depend on the order of the images."""
    images, directions = known_images(seed, count=40)
    cosines = images.vectors @ unit(directions).T
    found = average_precisions(cosines, images.is_true)
    words = [str(number) for number in range(LABELS)]
    truth = [{words[column] for column in np.flatnonzero(row)} for row in images.is_true]
    expected = evaluate(cosines, words, truth, min_cosines=np.full(LABELS, -1.0)).labels
    assert found.tolist() == pytest.approx([each.average_precision for each in expected if each.images])
    order = np.random.default_rng(seed).permutation(40)
    assert average_precisions(cosines[order], images.is_true[order]).tolist() == pytest.approx(found.tolist())


def test_equal_templates_change_nothing() -> None:
    images, directions = known_images(8)
    labels = unit(directions)
    assert np.allclose(mean_vectors([labels, labels]), labels)
    assert quality(images, mean_vectors([labels, labels])) == quality(images, labels)


def test_candidates_are_a_dozen_different_sentences() -> None:
    assert len(set(CANDIDATES)) == 12
    assert all(template.count("{}") == 1 for template in CANDIDATES)
