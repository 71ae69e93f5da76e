"""Vectors × labels → tags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shiwu.contract import Head, ModelInfo, Tag
from shiwu_worker.errors import WrongVectors
from shiwu_worker.job import Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.labels import EncodedLabels

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
) -> list[tuple[Tag, ...]]:
    """The best labels of each picture, (n, m) in, best first; equal scores keep the label set's order.

    All pictures at once: numpy's price is one of calls, and most label sets are small.
    """
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : max(top_k, default=0)]
    exact = np.take_along_axis(probabilities, best, axis=1)
    scores = exact.astype(np.float64).round(DIGITS).tolist()
    nearness = np.take_along_axis(cosines, best, axis=1).astype(np.float64).round(DIGITS).tolist()
    kept = np.minimum((exact >= np.asarray(threshold, np.float64)[:, None]).sum(axis=1), top_k).tolist()
    return [
        tuple(map(Tag, [words[i] for i in row[:count]], score, cosine))
        for row, score, cosine, count in zip(best.tolist(), scores, nearness, kept, strict=True)
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
        probabilities, cosines = score(vectors, labels.vectors, head=label_set.head, scale=self._scale, bias=self._bias)
        asked = [job.request for job in jobs]
        tags = top_tags(
            probabilities,
            cosines,
            label_set.words,
            top_k=[one.top_k if one else 0 for one in asked],
            threshold=[one.threshold if one else 0.0 for one in asked],
        )
        for i, (job, request) in enumerate(zip(jobs, asked, strict=True)):
            job.model = self._model
            if request is not None and "tags" in request.want:
                job.tags = tags[i]
            if request is not None and "embedding" in request.want:
                job.embedding = tuple(vectors[i].astype(np.float64).round(DIGITS).tolist())
