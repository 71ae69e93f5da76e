"""Limits of labels from a background: the wanted rate is kept, and a background of another kind is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shiwu_worker.calibration import (
    CalibrationError,
    CalibrationOptions,
    Pool,
    calibrate,
    fit_background,
    wilson,
)
from shiwu_worker.calibration.calibrate import rate_with_tags

WIDTH = 64


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def directions(seed: int, count: int) -> NDArray[np.float32]:
    """Unit vectors in all directions."""
    return unit(np.random.default_rng(seed).standard_normal((count, WIDTH)))


def pictures(seed: int, *, centres: NDArray[np.float32], count: int, spread: float = 1.0) -> Pool:
    """Pictures around random ones of the centres; the centre is the source."""
    chance = np.random.default_rng(seed)
    chosen = chance.integers(0, len(centres), count)
    noise = chance.standard_normal((count, WIDTH)) * spread / np.sqrt(WIDTH)
    return Pool(unit(centres[chosen] + noise), [f"source-{index}" for index in chosen])


@pytest.mark.parametrize("labels", [1, 8, 200])
def test_wanted_rate_is_kept_on_new_images(labels: int) -> None:
    """Over 40 seeds, for images of the distribution that the limits were chosen on: within 99 % of chance."""
    options = CalibrationOptions(false_rate=0.05)
    tagged = seen = 0
    for seed in range(40):
        words, centres = directions(seed, labels), directions(1000 + seed, 400)
        found = calibrate(pictures(seed, centres=centres, count=1200), words, options)
        new = pictures(9000 + seed, centres=centres, count=500)
        rate = rate_with_tags(new.vectors, words, found.min_cosines)
        tagged, seen = tagged + round(rate.share * len(new)), seen + len(new)
        assert found.fitted.share <= 0.05
    # The limit of each seed is itself chosen from 800 images, which widens the interval of 20,000 new ones.
    assert tagged / seen == pytest.approx(0.05, abs=0.006)


def test_images_of_other_kinds_are_noticed_on_those_kept_aside() -> None:
    """The sources kept aside lie near the labels and the others do not: the error says so, and --accept stores it."""
    words = directions(1, 4)
    far = pictures(2, centres=directions(3, 30), count=800)
    near = pictures(4, centres=words, count=400)
    pool = Pool(np.concatenate([far.vectors, near.vectors]), ["far"] * 800 + ["near"] * 400)
    options = CalibrationOptions(false_rate=0.05)
    with pytest.raises(CalibrationError, match=r"kept aside to get a tag, got 100.*sources differ"):
        calibrate(pool, words, options)
    found = calibrate(pool, words, CalibrationOptions(false_rate=0.05, is_forced=True))
    assert (found.images, found.images_aside, found.is_by_source) == (800, 400, True)
    assert found.aside.share > 0.9


def test_too_few_distinct_images_are_refused() -> None:
    """Copies of one picture count once, so they do not help."""
    pool = pictures(1, centres=directions(2, 50), count=300)
    copies = Pool(np.concatenate([pool.vectors] * 5), list(pool.sources) * 5)
    with pytest.raises(CalibrationError, match=r"at least 400 distinct images .* for a rate of 5.0%, got 194 "):
        calibrate(copies, directions(3, 4), CalibrationOptions(false_rate=0.05))
    found = calibrate(copies, directions(3, 4), CalibrationOptions(false_rate=0.05, is_forced=True))
    assert found.images + found.images_aside == 300
    assert "at least 400 distinct images" in found.warnings[0]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(CalibrationError, match="expected a rate above 0 and below 1"):
        calibrate(pictures(1, centres=directions(2, 50), count=300), directions(3, 4), CalibrationOptions(rate))


def test_empty_pool_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expected images"):
        calibrate(Pool(np.empty((0, WIDTH), np.float32), []), directions(3, 4), CalibrationOptions(0.1))


def test_pool_of_one_source_is_divided_by_images() -> None:
    pool = pictures(1, centres=directions(2, 1), count=600)
    found = calibrate(pool, directions(3, 4), CalibrationOptions(false_rate=0.1))
    assert not found.is_by_source
    assert found.images_aside == 200
    assert any("one source" in warning for warning in found.warnings)


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_no_source_is_in_both_parts(seed: int, count: int) -> None:
    pool = pictures(seed, centres=directions(seed, count), count=60)
    fitting, aside, is_by_source = pool.split(seed=seed)
    assert len(fitting) + len(aside) == 60
    assert is_by_source == (len(set(pool.sources)) > 1)
    assert not is_by_source or not set(fitting.sources) & set(aside.sources)


@given(seed=st.integers(0, 1000))
def test_order_of_labels_and_images_does_not_matter(seed: int) -> None:
    words, pool = directions(seed, 6), pictures(seed, centres=directions(seed + 1, 40), count=240)
    options = CalibrationOptions(false_rate=0.1, is_forced=True)
    chance = np.random.default_rng(seed)
    label_order, image_order = chance.permutation(6), chance.permutation(240)
    found = calibrate(pool, words, options)
    mixed = Pool(pool.vectors[image_order], [pool.sources[index] for index in image_order])
    other = calibrate(mixed, words[label_order], options)
    assert other.min_cosines == pytest.approx(found.min_cosines[label_order], abs=2e-5)
    assert other.aside.share == pytest.approx(found.aside.share, abs=0.02)


def test_lower_rate_gives_stricter_limits() -> None:
    words, pool = directions(1, 6), pictures(2, centres=directions(3, 200), count=3000)
    strict, lax = (calibrate(pool, words, CalibrationOptions(rate)) for rate in (0.02, 0.2))
    assert (strict.min_cosines > lax.min_cosines).all()


def test_labels_that_lie_near_everything_get_higher_limits() -> None:
    """One limit for all labels would give such a label to every image."""
    common = directions(5, 1)
    centres = unit(np.asarray(directions(6, 100) + 0.8 * common, np.float64))
    words = np.concatenate([common, directions(7, 3)])
    found = calibrate(pictures(8, centres=centres, count=1200), words, CalibrationOptions(0.05))
    assert found.min_cosines[0] > found.min_cosines[1:].max() + 0.1


def test_extremes_of_a_label_do_not_move_its_background() -> None:
    """Images that show a label are in the pool, up to one in twenty."""
    plain = np.random.default_rng(1).normal(0.1, 0.05, (1000, 1)).astype(np.float32)
    with_true = np.concatenate([plain[:970], np.full((30, 1), 0.9, np.float32)])
    before, after = fit_background(plain), fit_background(with_true)
    assert after.means == pytest.approx(before.means, abs=0.005)
    assert after.deviations == pytest.approx(before.deviations, rel=0.1)


@pytest.mark.parametrize("cosines", [np.empty((0, 2)), np.full((3, 2), np.nan)], ids=["none", "nan"])
def test_background_needs_numbers(cosines: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="expected cosines"):
        fit_background(cosines.astype(np.float32))


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (2, 200, 0.0027, 0.0357)],
)
def test_interval_is_wilsons(count: int, of: int, low: float, high: float) -> None:
    """Against the table of scipy 1.16, binomtest(count, of).proportion_ci(method="wilson")."""
    assert wilson(count, of) == pytest.approx((low, count / of, high), abs=1e-4)


@pytest.mark.parametrize(("count", "of"), [(1, 0), (-1, 5), (6, 5)])
def test_interval_needs_a_share(count: int, of: int) -> None:
    with pytest.raises(ValueError, match="expected a count"):
        wilson(count, of)
