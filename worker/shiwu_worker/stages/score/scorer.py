"""Vectors × labels → tags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from shiwu.contract import MAX_LABEL_CHARS, AnswerWarning, Head, ModelInfo, Request, Tag, WarningCode
from shiwu_worker.errors import WrongVectors
from shiwu_worker.jobs.job import Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.jobs.label_vectors import EncodedLabels

DIGITS: Final = 6
"""Decimals of scores, cosines and embeddings in answers."""
TAG_BYTES: Final = 64
"""JSON of one tag without its label."""
MAX_TAGS_BYTES: Final = 128 * 1024


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
        # Two forms of the function, each used where its exponential cannot overflow.
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
    """The best labels of each image, highest cosine first; equal cosines keep the order of the label set.

    The order follows the cosine and not the score, because a sigmoid may round the scores of all labels to 1.

    Args:
        probabilities, cosines: of each image and label, (n, m).
        top_k: most tags of each image.
        threshold: the least score of a tag, for each image.
        min_cosines: the least cosine of a tag, (n, m) or (1, m).
    """
    # Each numpy call handles all images, because on a small label set a call costs more than its arithmetic.
    keys, counts = -cosines, np.full(len(cosines), cosines.shape[1])
    if min_cosines is not None or any(threshold):
        kept = probabilities >= np.asarray(threshold, np.float64)[:, None]
        if min_cosines is not None:
            kept &= cosines >= min_cosines
        keys, counts = np.where(kept, keys, np.inf), kept.sum(axis=1)
    best = np.argsort(keys, axis=1, kind="stable")[:, : max(top_k, default=0)]
    scores = np.take_along_axis(probabilities, best, axis=1).astype(np.float64).round(DIGITS).tolist()
    rounded_cosines = np.take_along_axis(cosines, best, axis=1).astype(np.float64).round(DIGITS).tolist()
    lengths = np.minimum(counts, top_k).tolist()
    return [
        tuple(map(Tag, [words[i] for i in row[:count]], score, cosine))
        for row, score, cosine, count in zip(best.tolist(), scores, rounded_cosines, lengths, strict=True)
    ]


def cut_tags(tags: Sequence[Tag], max_bytes: int) -> int:
    """How many of the tags, in their order, fit into so many bytes of JSON."""
    left = max_bytes
    for count, tag in enumerate(tags):
        left -= TAG_BYTES + len(tag.label.encode())
        if left < 0:
            return count
    return len(tags)


class Scorer:
    """Gives the jobs of a batch their tags, with one matrix product for each label set of the batch.

    Args:
        max_tags_bytes: JSON of the tags of one answer; the last ones are left out of a longer list, with a warning.
    """

    def __init__(
        self,
        *,
        scale: float,
        bias: float | None,
        model: ModelInfo,
        max_tags_bytes: int = MAX_TAGS_BYTES,
    ) -> None:
        self._max_tags_bytes = max_tags_bytes
        # Almost every answer has so few tags that they fit with the longest labels.
        self._max_uncounted = max_tags_bytes // (TAG_BYTES + 4 * MAX_LABEL_CHARS)
        self._scale = scale
        self._bias = bias
        self._model = model

    def score(self, jobs: Sequence[Job], vectors: NDArray[np.float32]) -> None:
        """Set the tags and embeddings of the jobs; row i of `vectors` (n, d) belongs to `jobs[i]`.

        Raises:
            WrongVectors: when the number of vectors is wrong.
        """
        if len(jobs) != len(vectors):
            raise WrongVectors(f"expected {len(jobs)} vectors, one for each job, got {len(vectors)}")
        # Encoded labels are equal only to themselves, so no name or digest can merge two label sets into one group.
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
        requests = [job.request for job in jobs]
        tags = top_tags(
            probabilities,
            cosines,
            label_set.words,
            top_k=[request.top_k if request else 0 for request in requests],
            threshold=[request.threshold if request else 0.0 for request in requests],
            min_cosines=_min_cosines(requests, labels),
        )
        for i, (job, request) in enumerate(zip(jobs, requests, strict=True)):
            job.model = self._model
            if request is not None and "tags" in request.want:
                job.tags = tags[i]
                if len(tags[i]) > self._max_uncounted:
                    self._cut(job, tags[i])
            if request is not None and "embedding" in request.want:
                job.embedding = tuple(vectors[i].astype(np.float64).round(DIGITS).tolist())

    def _cut(self, job: Job, tags: tuple[Tag, ...]) -> None:
        count = cut_tags(tags, self._max_tags_bytes)
        if count < len(tags):
            text = f"the first {count} of {len(tags)} tags, because the list would exceed {self._max_tags_bytes} bytes"
            job.tags, job.warnings = (
                tags[:count],
                (*job.warnings, AnswerWarning(code=WarningCode.TAGS_CUT, message=text)),
            )


def _min_cosines(requests: Sequence[Request | None], labels: EncodedLabels) -> NDArray[np.float64] | None:
    """The least cosines (n, m) or (1, m) of these requests, or None if there are none."""
    own = [request.min_cosine if request else None for request in requests]
    if own.count(None) == len(own):
        return labels.min_cosines
    # The least cosine of a request replaces those of the label set.
    bounds = np.full((len(requests), len(labels.vectors)), -np.inf)
    if labels.min_cosines is not None:
        bounds[:] = labels.min_cosines
    for row, min_cosine in enumerate(own):
        if min_cosine is not None:
            bounds[row] = min_cosine
    return bounds
