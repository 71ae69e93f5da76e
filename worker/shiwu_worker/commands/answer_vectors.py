"""Vectors of images from answers in JSON lines, as `shiwu results` and `shiwu tag --json` print them."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec
import numpy as np

from shiwu.contract import Answer, ModelInfo
from shiwu.gallery.answer_lines import MAX_LINE_BYTES, read_answers
from shiwu_worker.calibration import Pool

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNIT: Final = 0.01
"""How far from 1 the length of a vector may be."""


class WrongAnswers(ValueError):
    """The lines are no answers, or none of them has a vector of this model."""


class _Truth(msgspec.Struct):
    image: str
    labels: list[str]


@dataclass(frozen=True, eq=False)
class AnswerVectors:
    """Unit vectors (n, d), float32, with the answers that they are from."""

    vectors: NDArray[np.float32]
    answers: Sequence[Answer]
    skipped: int
    """Answers without tags, without a vector, or of another model."""

    def pool(self) -> Pool:
        """The vectors with their sources: `source` in the metadata, or the reference up to its last slash."""
        return Pool(self.vectors, [_source(answer) for answer in self.answers])

    def without(self, ids: Collection[str]) -> AnswerVectors:
        """All but the answers with these ids."""
        rows = [row for row, answer in enumerate(self.answers) if answer.id not in ids]
        return AnswerVectors(self.vectors[rows], [self.answers[row] for row in rows], self.skipped)

    def with_truth(self, truth: Mapping[str, Collection[str]] | None) -> tuple[AnswerVectors, list[Collection[str]]]:
        """Those of the answers whose labels are known, and these labels.

        Args:
            truth: reference → labels; None for `labels` in the metadata of each answer.

        Raises:
            WrongAnswers: the labels of no image are known.
        """
        shown = [_labels(answer) if truth is None else truth.get(_reference(answer)) for answer in self.answers]
        rows = [row for row, labels in enumerate(shown) if labels is not None]
        if not rows:
            where = "the metadata of an answer" if truth is None else "--truth"
            raise WrongAnswers(f"expected the labels of some of the images in {where}, got none")
        kept = AnswerVectors(
            self.vectors[rows], [self.answers[row] for row in rows], self.skipped + len(shown) - len(rows)
        )
        return kept, [labels for labels in shown if labels is not None]


def read_vectors(lines: BinaryIO, *, model: ModelInfo) -> AnswerVectors:
    """Read answers with a vector or an embedding of this model.

    Raises:
        WrongAnswers: a line is no answer, or there is none with a vector of this model.
    """
    vectors: list[NDArray[np.float32]] = []
    answers: list[Answer] = []
    skipped = 0
    others: set[str] = set()
    try:
        for answer in read_answers(lines):
            vector = _vector(answer)
            if vector is None:
                skipped += 1
            elif answer.model is None or answer.model.revision != model.revision:
                skipped += 1
                others.add("unknown" if answer.model is None else f"{answer.model.id}@{answer.model.revision}")
            else:
                vectors.append(vector)
                answers.append(answer)
    except ValueError as error:
        raise WrongAnswers(str(error)) from error
    if not vectors:
        got = f"{skipped} answers without one" + (f" (models: {', '.join(sorted(others))})" if others else "")
        raise WrongAnswers(
            f"expected answers with a vector of {model.id}@{model.revision}, got {got}; enqueue with --want vector"
        )
    if len({len(vector) for vector in vectors}) > 1:
        raise WrongAnswers("expected vectors of one width, got several")
    return AnswerVectors(np.stack(vectors), answers, skipped)


def read_truth(lines: BinaryIO, *, folder: Path | None = None) -> dict[str, list[str]]:
    """Reference → the labels that the image shows.

    Args:
        folder: images may also be named by their paths in it.

    Raises:
        WrongAnswers: a line is of another form.
    """
    truth: dict[str, list[str]] = {}
    number = 0
    while line := lines.readline(MAX_LINE_BYTES):
        number += 1
        if not line.strip():
            continue
        try:
            read = msgspec.json.decode(line, type=_Truth)
        except msgspec.MsgspecError as error:
            expected = '{"image": reference, "labels": [label, …]}'
            raise WrongAnswers(f"--truth, line {number}: expected {expected} ({error})") from None
        is_path = folder is not None and "://" not in read.image
        truth[(folder / read.image).resolve().as_uri() if folder is not None and is_path else read.image] = read.labels
    return truth


def _vector(answer: Answer) -> NDArray[np.float32] | None:
    """The unit vector of an answer, or None where it has none that can be used."""
    if answer.vector is not None:
        try:
            raw = base64.b64decode(answer.vector, validate=True)
        except ValueError:
            return None
        vector = np.frombuffer(raw[: len(raw) // 2 * 2], "<f2").astype(np.float32)
    elif answer.embedding is not None:
        vector = np.array(answer.embedding, np.float32)
    else:
        return None
    length = float(np.linalg.norm(vector))
    # Rounded to float16 the length differs a little from 1; anything else is no vector of an image.
    return vector / np.float32(length) if np.isfinite(length) and abs(length - 1) <= UNIT else None


def _source(answer: Answer) -> str:
    named = answer.metadata.get("source") if isinstance(answer.metadata, dict) else None
    return named if isinstance(named, str) else _reference(answer).rpartition("/")[0]


def _labels(answer: Answer) -> list[str] | None:
    labels = answer.metadata.get("labels") if isinstance(answer.metadata, dict) else None
    return labels if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else None


def _reference(answer: Answer) -> str:
    return answer.image.reference if answer.image is not None else ""
