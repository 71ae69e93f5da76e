"""Probabilities of a label from images that show it or do not (Platt 1999), and thresholds for a precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from shiwu_worker.calibration.intervals import wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_POSITIVES: Final = 20
"""Images that must show a label, and as many that must not, before a curve means anything."""
MAX_STEPS: Final = 100
MAX_SLOPE: Final = 50.0
RIDGE: Final = 1e-6
"""Keeps the steps bounded where a curve would be a jump."""


@dataclass(frozen=True, slots=True)
class LabelCurve:
    """What labelled images tell of one label."""

    positives: int
    """Images that show it."""
    curve: tuple[float, float] | None = None
    """Slope and offset over z; None where there are too few images."""
    threshold: float | None = None
    """The least probability at which the precision is as wanted; None if none is wanted or reaches it."""
    reason: str = ""
    """Why the limit of the background decides."""


def fit_label(z: NDArray[np.float64], shows: NDArray[np.bool_], *, precision: float | None) -> LabelCurve:
    """Fit the curve of one label.

    Args:
        z: of each labelled image (n).
        shows: whether it shows the label (n).
        precision: the share of true tags that is wanted; the low end of its interval counts.
    """
    positives, negatives = int(shows.sum()), int((~shows).sum())
    if min(positives, negatives) < MIN_POSITIVES:
        got = f"{positives} images that show it and {negatives} that do not"
        return LabelCurve(positives, reason=f"expected at least {MIN_POSITIVES} of both, got {got}")
    curve = fit_curve(z, shows)
    if curve[0] <= 0:
        return LabelCurve(positives, reason="images that show it have no larger z than others")
    if precision is None:
        return LabelCurve(positives, curve)
    threshold = threshold_for(probabilities(z, curve), shows, precision=precision)
    if threshold is None:
        return LabelCurve(positives, curve, reason=f"no threshold has a precision of {precision:.0%}")
    return LabelCurve(positives, curve, threshold)


def probabilities(z: NDArray[np.float64], curve: tuple[float, float]) -> NDArray[np.float64]:
    """The sigmoid of slope · z + offset."""
    found: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(curve[0] * z + curve[1], -500, 500)))
    return found


def fit_curve(z: NDArray[np.float64], shows: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset with the largest likelihood, by Newton's method.

    The targets are a little within 0 and 1 (Platt 1999), so images that a z separates perfectly give no jump.
    """
    positives, count = int(shows.sum()), len(shows)
    targets = np.where(shows, (positives + 1) / (positives + 2), 1 / (count - positives + 2))
    # Around the middle and in units of the spread, where Newton's steps are safe.
    centre, spread = float(z.mean()), float(max(z.std(), 1e-9))
    inputs = np.column_stack(((z - centre) / spread, np.ones(count)))
    weights = np.zeros(2)
    for _ in range(MAX_STEPS):
        p = probabilities(inputs[:, 0], (weights[0], weights[1]))
        gradient = inputs.T @ (p - targets) + RIDGE * weights
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + RIDGE * np.eye(2)
        step = np.clip(np.linalg.solve(curvature, gradient), -1.0, 1.0)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    slope = float(np.clip(weights[0], -MAX_SLOPE, MAX_SLOPE)) / spread
    return slope, float(weights[1]) - slope * centre


def threshold_for(p: NDArray[np.float64], shows: NDArray[np.bool_], *, precision: float) -> float | None:
    """The least threshold from which on the low end of the precision's interval is as wanted; None without one."""
    order = np.argsort(-p, kind="stable")
    hits = np.cumsum(shows[order])
    for rank in range(len(order) - 1, -1, -1):
        # Equal probabilities pass together.
        is_last_of_equals = rank + 1 == len(order) or p[order[rank + 1]] < p[order[rank]]
        if is_last_of_equals and wilson(int(hits[rank]), rank + 1).low >= precision:
            return float(p[order[rank]])
    return None
