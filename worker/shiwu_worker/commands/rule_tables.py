"""What a label set of version 2 decides on images whose vectors are known, and its calibration file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from shiwu.contract import ModelInfo, Request, Tag
from shiwu_worker.calibration import Background, Calibration, CalibrationOptions, Decision, LabelCurve, fit_label
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.label_rules import CalibratedLabels, LabelRules
from shiwu_worker.stages.score.label_files import CalibrationFile, LabelFigures, RateAside, texts_digest
from shiwu_worker.stages.score.scorer import Scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels

DIGITS: Final = 8
"""Decimals of the figures of a calibration file."""
MAX_TAGS: Final = 1000


def tags_of(
    cosines: NDArray[np.float32], encoded: EncodedLabels, *, scale: float, bias: float | None, top_k: int = MAX_TAGS
) -> list[tuple[Tag, ...]]:
    """The tags of images with these cosines of labels (n, m), for a request without limits of its own."""
    model = ModelInfo(id="", revision="", dtype="", device="")
    request = Request(image="s3://b/k", top_k=top_k)
    return Scorer(scale=scale, bias=bias, model=model).tags(cosines, encoded, [request] * len(cosines))


def label_cosines(vectors: NDArray[np.float32], encoded: EncodedLabels) -> NDArray[np.float32]:
    """The cosines (n, m) of images (n, d) and labels; of several texts of a label the best."""
    return encoded.best_of_texts(vectors @ encoded.vectors.T)


def given(tags: Sequence[tuple[Tag, ...]], label_set: LabelSet) -> NDArray[np.bool_]:
    """Whether each image gets each label (n, m). The label of unknown images is none."""
    places = {word: place for place, word in enumerate(label_set.words)}
    found = np.zeros((len(tags), len(places)), bool)
    for row, each in enumerate(tags):
        if not label_set.is_unknown(each):
            found[row, [places[tag.label] for tag in each]] = True
    return found


def rules_of(label_set: LabelSet) -> LabelRules:
    """The rules of a set that decides by z.

    Raises:
        FatalError: with ExitCode.CONFIG, for another head.
    """
    if label_set.rules is None or label_set.head != "z":
        text = f"expected a label set with head: z, got {label_set.name} with {label_set.head}"
        raise FatalError(ExitCode.CONFIG, f"{text}; a background decides nothing there")
    return label_set.rules


class RuleCalibration:
    """Decides as a set would with the figures that are being chosen.

    Args:
        encoded: the set, whose calibration file may be missing.
        labelled: cosines (n, m) of images with known labels; None without any.
        shows: whether these images show each label, (n, m).
        precision: the precision that thresholds of labels are chosen for.
    """

    def __init__(
        self,
        encoded: EncodedLabels,
        *,
        scale: float,
        bias: float | None,
        labelled: NDArray[np.float32] | None = None,
        shows: NDArray[np.bool_] | None = None,
        precision: float | None = None,
    ) -> None:
        self._encoded, self._rules = encoded, rules_of(encoded.label_set)
        self._scale, self._bias = scale, bias
        self._labelled, self._shows, self._precision = labelled, shows, precision
        self.curves: list[LabelCurve] = []
        """Of each label, from the last decision."""
        self.decision = Decision(
            cosines=lambda vectors: label_cosines(vectors, encoded),
            is_counted=self._rules.tables.can_be_given,
            has_tag=self._has_tag,
        )

    def _has_tag(self, cosines: NDArray[np.float32], background: Background, z: float) -> NDArray[np.bool_]:
        self.curves = self._fit(background)
        calibration = CalibratedLabels(
            digest="",
            revision="",
            means=tuple(background.means.tolist()),
            deviations=tuple(background.deviations.tolist()),
            z=z,
            curves=tuple(each.curve for each in self.curves),
            thresholds=tuple(each.threshold for each in self.curves),
        )
        rules = replace(self._rules, calibration=calibration)
        label_set = replace(self._encoded.label_set, rules=rules)
        encoded = replace(self._encoded, label_set=label_set)
        tags = tags_of(cosines, encoded, scale=self._scale, bias=self._bias, top_k=1)
        return np.asarray(given(tags, label_set).any(axis=1))

    def _fit(self, background: Background) -> list[LabelCurve]:
        count = len(self._encoded.label_set.words)
        if self._labelled is None or self._shows is None:
            return [LabelCurve(0) for _ in range(count)]
        z = background.z_scores(self._labelled)
        return [fit_label(z[:, place], self._shows[:, place], precision=self._precision) for place in range(count)]

    def file(self, found: Calibration, options: CalibrationOptions, model: ModelInfo) -> bytes:
        """The calibration file."""
        label_set = self._encoded.label_set
        background = found.background
        columns = (label_set.words, self._rules.phrases, background.means, background.deviations, self.curves)
        figures = zip(*columns, strict=True)
        content = CalibrationFile(
            version=1,
            set=str(label_set.name),
            model=model.id,
            revision=model.revision,
            z=float(np.ceil(found.z * 1e6) / 1e6),
            false_rate=options.false_rate,
            false_rate_aside=RateAside(*(round(each, 6) for each in found.aside)),
            images=found.images,
            images_aside=found.images_aside,
            by_source=found.is_by_source,
            seed=options.seed,
            precision=self._precision,
            labels={
                word: LabelFigures(
                    texts=texts_digest(phrases),
                    mean=round(float(mean), DIGITS),
                    deviation=round(float(deviation), DIGITS),
                    curve=each.curve,
                    threshold=each.threshold,
                    positives=each.positives,
                )
                for word, phrases, mean, deviation, each in figures
            },
        )
        return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def shown_labels(truth: Sequence[Collection[str]], label_set: LabelSet) -> NDArray[np.bool_]:
    """Whether each image shows each label (n, m); aliases count as their labels."""
    aliases = [()] * len(label_set.words) if label_set.rules is None else label_set.rules.aliases
    names = [{word, *more} for word, more in zip(label_set.words, aliases, strict=True)]
    return np.array([[not names_of.isdisjoint(shown) for names_of in names] for shown in truth], bool)


def with_names(truth: Sequence[Collection[str]], label_set: LabelSet) -> list[list[str]]:
    """The labels that each image shows, by their names in the set."""
    words = label_set.words
    return [[words[place] for place in np.flatnonzero(row)] for row in shown_labels(truth, label_set)]
