"""Probabilities of labels from labelled images, and thresholds for a precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shiwu_worker.calibration import fit_curve, fit_label, threshold_for, wilson
from shiwu_worker.calibration.curves import MIN_POSITIVES, probabilities


def images(count: int, *, slope: float, offset: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The z of images, and whether they show a label whose probability follows this curve."""
    chance = np.random.default_rng(seed)
    z = chance.normal(1.0, 2.0, count)
    return z, chance.random(count) < probabilities(z, (slope, offset))


@pytest.mark.parametrize(("slope", "offset"), [(1.0, -2.0), (2.5, -6.0), (0.5, 0.0)])
def test_curve_recovers_slope_and_offset(slope: float, offset: float) -> None:
    """Over seeds; the error of one fit is that of twenty thousand images."""
    fits = np.array([fit_curve(*images(20_000, slope=slope, offset=offset, seed=seed)) for seed in range(5)])
    assert fits.mean(axis=0) == pytest.approx((slope, offset), rel=0.05, abs=0.05)


def test_separated_images_give_a_finite_curve() -> None:
    """A z that tells them apart perfectly gives no jump, and probabilities within 0 and 1."""
    z = np.concatenate((np.linspace(-1, 0, 50), np.linspace(3, 4, 50)))
    slope, offset = fit_curve(z, z > 1)
    assert np.isfinite((slope, offset)).all()
    p = probabilities(z, (slope, offset))
    assert p[:50].max() < 0.2
    assert p[50:].min() > 0.8


@given(st.integers(0, 50), st.floats(0.1, 10))
def test_order_and_scale_of_z_do_not_matter(seed: int, scale: float) -> None:
    """Probabilities are those of the images."""
    z, shows = images(300, slope=1.0, offset=-1.0, seed=seed)
    order = np.random.default_rng(seed).permutation(len(z))
    expected = probabilities(z, fit_curve(z, shows))
    moved = z[order] * scale + 3
    assert probabilities(moved, fit_curve(moved, shows[order])) == pytest.approx(expected[order], abs=1e-3)


@given(st.integers(0, 50), st.floats(0.3, 0.95))
def test_threshold_has_the_wanted_precision(seed: int, precision: float) -> None:
    """The low end of the interval counts, and a stricter wish gives no lower threshold."""
    z, shows = images(400, slope=1.5, offset=-2.0, seed=seed)
    p = probabilities(z, (1.5, -2.0))
    threshold = threshold_for(p, shows, precision=precision)
    if threshold is not None:
        passing = p >= threshold
        assert wilson(int(shows[passing].sum()), int(passing.sum())).low >= precision
    stricter = threshold_for(p, shows, precision=min(0.99, precision + 0.05))
    assert stricter is None or (threshold is not None and stricter >= threshold)


def test_label_without_enough_images_falls_back() -> None:
    """It has no curve, and the reason says how many images there are."""
    z, shows = np.arange(100.0), np.arange(100) >= 100 - MIN_POSITIVES + 1
    few = fit_label(z, shows, precision=0.9)
    assert (few.curve, few.threshold, few.positives) == (None, None, MIN_POSITIVES - 1)
    assert "expected at least 20 of both, got 19 images that show it and 81" in few.reason
    wrong = fit_label(-z, z > 50, precision=None)
    assert (wrong.curve, wrong.reason) == (None, "images that show it have no larger z than others")
    noise = fit_label(z, np.arange(100) % 2 == 1, precision=0.99)
    assert noise.threshold is None
    good = fit_label(z, z > 50, precision=0.5)
    assert good.curve is not None
    assert good.threshold is not None
    assert not good.reason
