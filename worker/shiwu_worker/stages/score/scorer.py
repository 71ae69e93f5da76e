"""Vectors × labels → tags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shiwu.contract import Head, ModelInfo, Request, Tag
from shiwu_worker.errors import WrongVectors
from shiwu_worker.jobs.job import Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.jobs.label_vectors import EncodedLabels

DIGITS = 6


def score(
    vectors: NDArray[np.float32], labels: NDArray[np.float32], *, head: Head, scale: float, bias: float | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compare unit vectors (n, d) with label vectors (m, d).

    Returns:
        Probabilities (n, m) and cosines (n, m), float32. softmax(scale · cosine) as CLIP, or
        sigmoid(scale · cosine + bias) as SigLIP (Zhai et al. 2023, section 3).
    """
    cosines = vectors @ labels.T
    logits = cosines * np.float32(scale) + np.float32(bias or 0.0)
    if head == "sigmoid":
        # The two forms of the function, each where its exponential can't overflow.
        small = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32), cosines
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True), cosines


def top_tags(
    probabilities: NDArray[np.float32],
    cosines: NDArray[np.float32],
    words: Sequence[str],
    *,
    top_k: Sequence[int],
    threshold: Sequence[float],
    min_cosines: NDArray[np.float64] | None = None,
) -> list[tuple[Tag, ...]]:
    """The best labels of each image, (n, m) in, nearest first; equal cosines keep the label set's order.

    Ordered by cosine and not by score: a sigmoid may round the scores of all labels to 1.

    Args:
        threshold: the least score of a tag, for each image.
        min_cosines: the least cosine of a tag, (n, m) or (1, m).
    """
    # All images in one call each: a numpy call costs more than its arithmetic on a small label set.
    keys, counts = -cosines, np.full(len(cosines), cosines.shape[1])
    if min_cosines is not None or any(threshold):
        kept = probabilities >= np.asarray(threshold, np.float64)[:, None]
        if min_cosines is not None:
            kept &= cosines >= min_cosines
        keys, counts = np.where(kept, keys, np.inf), kept.sum(axis=1)
    best = np.argsort(keys, axis=1, kind="stable")[:, : max(top_k, default=0)]
    scores = np.take_along_axis(probabilities, best, axis=1).astype(np.float64).round(DIGITS).tolist()
    nearness = np.take_along_axis(cosines, best, axis=1).astype(np.float64).round(DIGITS).tolist()
    lengths = np.minimum(counts, top_k).tolist()
    return [
        tuple(map(Tag, [words[i] for i in row[:count]], score, cosine))
        for row, score, cosine, count in zip(best.tolist(), scores, nearness, lengths, strict=True)
    ]


class Scorer:
    """Gives the jobs of a batch their tags, with one matrix product for each label set among them."""

    def __init__(
        self,
        *,
        scale: float,
        bias: float | None,
        model: ModelInfo,
    ) -> None:
        self._scale = scale
        self._bias = bias
        self._model = model

    def score(self, jobs: Sequence[Job], vectors: NDArray[np.float32]) -> None:
        """Row i of `vectors` (n, d) belongs to `jobs[i]`."""
        if len(jobs) != len(vectors):
            raise WrongVectors(f"expected {len(jobs)} vectors, one for each job, got {len(vectors)}")
        # Encoded labels are equal only to themselves: no name or digest can make two label sets one group.
        groups: dict[EncodedLabels, list[int]] = defaultdict(list)
        for row, job in enumerate(jobs):
            if job.labels is not None:
                groups[job.labels].append(row)
        for labels, rows in groups.items():
            self._score_group([jobs[row] for row in rows], vectors[rows], labels)

    def _score_group(self, jobs: Sequence[Job], vectors: NDArray[np.float32], labels: EncodedLabels) -> None:
        label_set = labels.label_set
        probabilities, cosines = score(
            vectors,
            labels.vectors,
            head=label_set.head,
            scale=self._scale if label_set.scale is None else label_set.scale,
            bias=self._bias if label_set.bias is None else label_set.bias,
        )
        asked = [job.request for job in jobs]
        tags = top_tags(
            probabilities,
            cosines,
            label_set.words,
            top_k=[one.top_k if one else 0 for one in asked],
            threshold=[one.threshold if one else 0.0 for one in asked],
            min_cosines=_min_cosines(asked, labels),
        )
        for i, (job, request) in enumerate(zip(jobs, asked, strict=True)):
            job.model = self._model
            if request is not None and "tags" in request.want:
                job.tags = tags[i]
            if request is not None and "embedding" in request.want:
                job.embedding = tuple(vectors[i].astype(np.float64).round(DIGITS).tolist())


def _min_cosines(asked: Sequence[Request | None], labels: EncodedLabels) -> NDArray[np.float64] | None:
    """The least cosines (n, m) or (1, m) of these requests, or None where there is no bound."""
    own = [one.min_cosine if one else None for one in asked]
    if own.count(None) == len(own):
        return labels.min_cosines
    # A request's own bound takes the place of the label set's.
    bounds = np.full((len(asked), len(labels.vectors)), -np.inf)
    if labels.min_cosines is not None:
        bounds[:] = labels.min_cosines
    for row, one in enumerate(own):
        if one is not None:
            bounds[row] = one
    return bounds
