"""Warnings of an answer that follow from its label set and its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from shiwu.contract import AnswerWarning, WarningCode
from shiwu_worker.jobs.label_checks import LabelFindings
from shiwu_worker.jobs.label_set import LabelSet

MAX_EXAMPLES: Final = 3
"""Most labels or groups that a warning names, because every answer has the warning."""
MAX_SHOWN_CHARS: Final = 60
SINGLE_LABEL: Final = AnswerWarning(
    code=WarningCode.SINGLE_LABEL,
    message="the softmax score of a single label is always 1; add other labels, or judge by the cosine",
)


def label_warnings(
    label_set: LabelSet, findings: LabelFindings, *, revision: str | None = None
) -> tuple[AnswerWarning, ...]:
    """The reasons to read tags of this label set with care.

    Args:
        revision: of the model; None where it is not known.
    """
    return tuple(_warnings(label_set, findings, revision=revision))


def _warnings(label_set: LabelSet, findings: LabelFindings, *, revision: str | None) -> Iterator[AnswerWarning]:
    if findings.unreadable:
        count = f"{len(findings.unreadable)} of {len(label_set.words)} labels"
        text = f"the model cannot read {count}: {_first_texts(findings.unreadable, ', ')}; their scores have no meaning"
        yield AnswerWarning(code=WarningCode.LABELS_UNREADABLE, message=text)
    if findings.alike:
        groups = [_first_texts(group, " = ") for group in findings.alike[: MAX_EXAMPLES + 1]]
        text = f"the model cannot tell these labels apart: {_first_texts(groups, '; ')}"
        yield AnswerWarning(code=WarningCode.LABELS_ALIKE, message=text)
    if len(label_set.words) == 1 and label_set.head == "softmax":
        yield SINGLE_LABEL
    if label_set.calibrated_for is not None and revision is not None and label_set.calibrated_for != revision:
        text = f"the limits were chosen for revision {label_set.calibrated_for} of the model, and this is {revision}"
        yield AnswerWarning(code=WarningCode.CALIBRATION_STALE, message=f"{text}; calibrate the label set again")


def _first_texts(texts: Sequence[str], separator: str) -> str:
    """The first texts, each cut to a readable length."""
    shown = [text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…" for text in texts[:MAX_EXAMPLES]]
    return separator.join([*shown, "…"] if len(texts) > MAX_EXAMPLES else shown)
