"""Limits of labels from images that show none of them: how far a cosine must stand out before an image gets a tag.

A softmax score depends on the other labels of a set, and one limit of the cosine does not fit all labels, because some
labels lie near every image. Here each label is compared with its own background.
"""

from shiwu_worker.calibration.background import Background, fit_background
from shiwu_worker.calibration.calibrate import (
    Calibration,
    CalibrationError,
    CalibrationOptions,
    Decision,
    calibrate,
)
from shiwu_worker.calibration.curves import LabelCurve, fit_curve, fit_label, threshold_for
from shiwu_worker.calibration.evaluate import Evaluation, LabelScore, evaluate
from shiwu_worker.calibration.intervals import Interval, wilson
from shiwu_worker.calibration.pool import Pool

__all__ = [
    "Background",
    "Calibration",
    "CalibrationError",
    "CalibrationOptions",
    "Decision",
    "Evaluation",
    "Interval",
    "LabelCurve",
    "LabelScore",
    "Pool",
    "calibrate",
    "evaluate",
    "fit_background",
    "fit_curve",
    "fit_label",
    "threshold_for",
    "wilson",
]
