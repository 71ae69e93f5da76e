"""The file that `shiwu-worker labels calibrate` writes for a label set of version 2."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
from pydantic_core import to_json

from shiwu.contract import WarningCode
from shiwu_worker.jobs.label_rules import CalibratedLabels, Phrase
from shiwu_worker.jobs.label_set import DIGEST_CHARS

MAX_FILE_BYTES: Final = 64 << 20
MIN_DEVIATION: Final = 1e-9


class StaleCalibration(ValueError):
    """The file was made for other labels or texts. The text begins with the code `calibration_stale`, or has it after
    the path."""


class LabelFigures(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One label."""

    texts: str
    """Digest of its texts and templates: other texts have other cosines."""
    mean: float
    deviation: float
    curve: tuple[float, float] | None = None
    """Slope and offset of the probability over z."""
    threshold: float | None = None
    """The least probability at which the precision is as wanted."""
    positives: int = 0
    """Images that show the label."""


class RateAside(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Share of the images kept aside that get any tag, with its 95 % interval."""

    low: float
    share: float
    high: float


class CalibrationFile(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The whole file."""

    version: Literal[1]
    set: str
    model: str
    revision: str
    z: float
    false_rate: float
    """The rate that was asked for."""
    false_rate_aside: RateAside
    images: int
    images_aside: int
    by_source: bool
    seed: int
    labels: dict[str, LabelFigures]
    precision: float | None = None
    """The precision that was asked for."""


def texts_digest(phrases: Sequence[Phrase]) -> str:
    """What the cosines of a label depend on, besides the model."""
    return hashlib.sha256(to_json(sorted(set(phrases)))).hexdigest()[:16]


def read_calibration(path: Path, words: Sequence[str], phrases: Sequence[Sequence[Phrase]]) -> CalibratedLabels:
    """Read the figures of these labels.

    Raises:
        StaleCalibration: the file was made for other labels or texts.
        ValueError: names the file and the error in it.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"expected at most {MAX_FILE_BYTES} bytes, got more")
        return _calibrated(msgspec.json.decode(raw, type=CalibrationFile), words, phrases)
    except FileNotFoundError as error:
        text = "expected a calibration file, and there is none yet; `shiwu-worker labels calibrate` writes it"
        raise ValueError(f"{path}: {text}") from error
    except StaleCalibration as error:
        raise StaleCalibration(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a file that `shiwu-worker labels calibrate` wrote ({error})") from error


def _calibrated(file: CalibrationFile, words: Sequence[str], phrases: Sequence[Sequence[Phrase]]) -> CalibratedLabels:
    figures: list[LabelFigures] = []
    for word, each in zip(words, phrases, strict=True):
        found = file.labels.get(word)
        if found is None or found.texts != texts_digest(each):
            what = "none" if found is None else "one of other texts or templates"
            text = f"expected figures of every label, got {what} of {word!r}; calibrate the label set again"
            raise StaleCalibration(f"{WarningCode.CALIBRATION_STALE}: {text}")
        numbers = [found.mean, *(found.curve or ()), *([] if found.threshold is None else [found.threshold])]
        if not all(map(math.isfinite, numbers)) or not found.deviation >= MIN_DEVIATION:
            raise ValueError(f"expected numbers, and a deviation above 0, got others of {word!r}")
        figures.append(found)
    if not math.isfinite(file.z):
        raise ValueError(f"expected a number as z, got {file.z}")
    used = [file.revision, file.z, [(each.mean, each.deviation, each.curve, each.threshold) for each in figures]]
    return CalibratedLabels(
        digest=hashlib.sha256(to_json(used)).hexdigest()[:DIGEST_CHARS],
        revision=file.revision,
        means=tuple(each.mean for each in figures),
        deviations=tuple(each.deviation for each in figures),
        z=file.z,
        curves=tuple(each.curve for each in figures),
        thresholds=tuple(each.threshold for each in figures),
    )
