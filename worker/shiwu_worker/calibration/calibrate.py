"""Chooses the limits of a label set, and measures on images kept aside what they do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from shiwu_worker.calibration.background import Background, fit_background
from shiwu_worker.calibration.intervals import Interval, wilson
from shiwu_worker.calibration.pool import Pool

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES_PER_FALSE_TAG: Final = 20
"""The images that a limit is chosen on must show at least so many false tags, or the limit is chance."""
DIGITS: Final = 6
"""Decimals of a limit."""
TOLERATED: Final = 2.0
"""How many times the wanted rate the images kept aside may have."""


class CalibrationError(Exception):
    """The images do not suffice, or the limits do not hold on the images kept aside."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What is wanted of the limits."""

    false_rate: float
    """Share of images without any label of the set that may get a tag, above 0 and below 1."""
    seed: int = 0
    """Of the choice of the sources that are kept aside."""
    is_forced: bool = False
    """Accept too few images, and limits that do not hold on the images kept aside."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The limits, and what is known of them."""

    background: Background
    z: float
    """How many deviations above its background a label must be."""
    min_cosines: NDArray[np.float64]
    """The same as the least cosine of each label, (m)."""
    fitted: Interval
    """Share of the images that the limits were chosen on with any tag."""
    aside: Interval
    """The same of the images kept aside."""
    images: int
    """Distinct images that the limits were chosen on."""
    images_aside: int
    is_by_source: bool
    """Whether the images kept aside are of other sources."""
    warnings: tuple[str, ...] = ()
    """What was accepted because `is_forced` is set."""


@dataclass(frozen=True, eq=False)
class Decision:
    """How a label set of version 2 decides, where that is not by the least cosine of each label."""

    cosines: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Images (n, d) → cosines of each label (n, m)."""
    is_counted: NDArray[np.bool_]
    """The labels (m) that an image can get."""
    has_tag: Callable[[NDArray[np.float32], Background, float], NDArray[np.bool_]]
    """Whether images with these cosines (n, m) get any tag, at this z."""


def calibrate(
    pool: Pool, labels: NDArray[np.float32], options: CalibrationOptions, *, decision: Decision | None = None
) -> Calibration:
    """Choose one z score for all labels, so that images of the pool get any tag at the wanted rate.

    The pool stands for images that show none of the labels. A few that do are no harm: the extremes of each label are
    left out, and the rate counts them as false tags, which makes the limits stricter. The limit is a quantile of the
    largest z score of each image, because a limit for each label alone would add up over the labels.

    Args:
        labels: unit vectors (m, d) of the labels.
        decision: of a label set of version 2; `labels` is not used then.

    Raises:
        CalibrationError: there are too few images, or the rate on the images kept aside exceeds TOLERATED times the
            wanted one by more than chance.
    """
    if not 0 < options.false_rate < 1:
        raise CalibrationError(f"expected a rate above 0 and below 1, got {options.false_rate:g}")
    fitting, aside, is_by_source = pool.distinct().split(seed=options.seed)
    warnings = _check_sizes(fitting, aside, options)
    cosines_of = (lambda vectors: vectors @ labels.T) if decision is None else decision.cosines
    cosines = cosines_of(fitting.vectors)
    background = fit_background(cosines)
    z_scores = background.z_scores(cosines)
    largest = np.sort((z_scores if decision is None else z_scores[:, decision.is_counted]).max(axis=1))[::-1]
    allowed = math.floor(options.false_rate * len(largest))
    # Tags are given from the limit on, so it lies just above the first image that must not get one.
    z = float(np.nextafter(largest[allowed], np.inf))
    # Rounded up: files hold so many digits, and the rate must not grow by that.
    min_cosines = np.minimum(np.ceil(background.cosines_at(z) * 10**DIGITS) / 10**DIGITS, 1.0)

    def rate(vectors: NDArray[np.float32]) -> Interval:
        if decision is None:
            return rate_with_tags(vectors, labels, min_cosines)
        return wilson(int(decision.has_tag(cosines_of(vectors), background, z).sum()), len(vectors))

    found = Calibration(
        background=background,
        z=z,
        min_cosines=min_cosines,
        fitted=rate(fitting.vectors),
        aside=rate(aside.vectors),
        images=len(fitting),
        images_aside=len(aside),
        is_by_source=is_by_source,
        warnings=(*warnings, *([] if is_by_source else ["the images are of one source, so those kept aside are too"])),
    )
    if found.aside.low > TOLERATED * options.false_rate and not options.is_forced:
        had = f"{found.aside.share:.1%} ({found.aside.low:.1%} to {found.aside.high:.1%})"
        raise CalibrationError(
            f"expected at most {TOLERATED * options.false_rate:.1%} of the images kept aside to get a tag, got {had}: "
            "the sources differ; add images of more sources, or accept the limits with --accept"
        )
    return found


def rate_with_tags(
    vectors: NDArray[np.float32], labels: NDArray[np.float32], min_cosines: NDArray[np.float64]
) -> Interval:
    """The share of images (n, d) that get any tag."""
    count = int((vectors @ labels.T >= min_cosines).any(axis=1).sum())
    return wilson(count, len(vectors))


def _check_sizes(fitting: Pool, aside: Pool, options: CalibrationOptions) -> list[str]:
    if not len(fitting) or not len(aside):
        raise CalibrationError(f"expected images, some of them to be kept aside, got {len(fitting)} and {len(aside)}")
    least = math.ceil(IMAGES_PER_FALSE_TAG / options.false_rate)
    if len(fitting) >= least:
        return []
    text = (
        f"expected at least {least} distinct images to choose limits for a rate of {options.false_rate:.1%}, got "
        f"{len(fitting)} beside {len(aside)} kept aside"
    )
    if not options.is_forced:
        raise CalibrationError(f"{text}; bring more images, or ask for a higher rate")
    return [text]
