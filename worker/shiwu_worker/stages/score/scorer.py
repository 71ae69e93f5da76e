"""Vectors × labels → tags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from shiwu.contract import MAX_LABEL_CHARS, AnswerWarning, Head, ModelInfo, Request, Tag, WarningCode
from shiwu_worker.errors import WrongVectors
from shiwu_worker.jobs.job import Job
from shiwu_worker.stages.score.kept_vectors import kept_cosines, rounded, to_base64
from shiwu_worker.stages.score.ranking import smallest
from shiwu_worker.stages.score.rule_scorer import rule_tags, sigmoid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.jobs.label_vectors import EncodedLabels

DIGITS: Final = 6
"""Decimals of scores, cosines and embeddings in answers."""
TAG_BYTES: Final = 64
"""JSON of one tag without its label."""
MAX_TAGS_BYTES: Final = 128 * 1024
ONLY_TAGS: Final = ("tags",)


def score(
    vectors: NDArray[np.float32], labels: NDArray[np.float32], *, head: Head, scale: float, bias: float | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compare unit vectors (n, d) with label vectors (m, d).

    Returns:
        Probabilities (n, m) and cosines (n, m), float32. softmax(scale · cosine) as CLIP, or
        sigmoid(scale · cosine + bias) as SigLIP (Zhai et al. 2023, section 3).
    """
    cosines = vectors @ labels.T
    return probabilities_of(cosines, head=head, scale=scale, bias=bias), cosines


def probabilities_of(
    cosines: NDArray[np.float32], *, head: Head, scale: float, bias: float | None
) -> NDArray[np.float32]:
    """The scores (n, m), float32, of cosines (n, m); each row depends on that row only."""
    logits: NDArray[np.float32] = cosines * np.float32(scale) + np.float32(bias or 0.0)
    if head == "sigmoid":
        return sigmoid(logits)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


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
    best = smallest(keys, max(top_k, default=0))
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

    def kept_tags(
        self, halves: NDArray[np.float16], labels: EncodedLabels, requests: Sequence[Request | None]
    ) -> list[tuple[Tag, ...]]:
        """The tags of rounded vectors (n, d), one for each request: the same for a vector whatever its neighbours are.

        Lists that are too long are left as they are; see `fitting`.
        """
        return self._tags(kept_cosines(halves, labels.vectors), labels, requests)

    def image_tags(
        self, vectors: NDArray[np.float32], labels: EncodedLabels, requests: Sequence[Request]
    ) -> list[tuple[Tag, ...]]:
        """The tags that jobs with these vectors (n, d) and requests would get with these labels."""
        tags = self._tags(vectors @ labels.vectors.T, labels, requests)
        # Tags beside a vector are made from that vector.
        if keeping := [row for row, request in enumerate(requests) if "vector" in request.want]:
            kept = self.kept_tags(rounded(vectors[keeping]), labels, [requests[row] for row in keeping])
            for row, each in zip(keeping, kept, strict=True):
                tags[row] = each
        return [self.fitting(each)[0] for each in tags]

    def tags(
        self, cosines: NDArray[np.float32], labels: EncodedLabels, requests: Sequence[Request | None]
    ) -> list[tuple[Tag, ...]]:
        """The tags of images with these cosines of labels (n, m), one for each request."""
        label_set = labels.label_set
        probabilities = probabilities_of(
            cosines,
            head="softmax" if label_set.head == "z" else label_set.head,
            scale=self._scale if label_set.scale is None else label_set.scale,
            bias=self._bias if label_set.bias is None else label_set.bias,
        )
        if label_set.rules is not None:
            return rule_tags(cosines, probabilities, label_set, label_set.rules, requests)
        return top_tags(
            probabilities,
            cosines,
            label_set.words,
            top_k=[request.top_k if request else 0 for request in requests],
            threshold=[request.threshold if request else 0.0 for request in requests],
            min_cosines=_min_cosines(requests, labels),
        )

    def fitting(self, tags: tuple[Tag, ...]) -> tuple[tuple[Tag, ...], AnswerWarning | None]:
        """The tags that an answer may hold, and a warning where that is not all of them."""
        count = len(tags) if len(tags) <= self._max_uncounted else cut_tags(tags, self._max_tags_bytes)
        if count == len(tags):
            return tags, None
        text = f"the first {count} of {len(tags)} tags, because the list would exceed {self._max_tags_bytes} bytes"
        return tags[:count], AnswerWarning(code=WarningCode.TAGS_CUT, message=text)

    def _score_group(self, jobs: Sequence[Job], vectors: NDArray[np.float32], labels: EncodedLabels) -> None:
        requests = [job.request for job in jobs]
        tags = self._tags(vectors @ labels.vectors.T, labels, requests)
        others = []
        for i, (job, request) in enumerate(zip(jobs, requests, strict=True)):
            job.model = self._model
            if request is None:
                continue
            if request.want == ONLY_TAGS:
                job.tags = tags[i]
                if len(tags[i]) > self._max_uncounted:
                    self._set_tags(job, tags[i])
            else:
                others.append(i)
        if others:
            rows = np.array(others)
            self._set_others([jobs[i] for i in others], vectors[rows], labels, [tags[i] for i in others])

    def _tags(
        self, cosines: NDArray[np.float32], labels: EncodedLabels, requests: Sequence[Request | None]
    ) -> list[tuple[Tag, ...]]:
        return self.tags(labels.best_of_texts(cosines), labels, requests)

    def _set_others(
        self,
        jobs: Sequence[Job],
        vectors: NDArray[np.float32],
        labels: EncodedLabels,
        tags: Sequence[tuple[Tag, ...]],
    ) -> None:
        """Set what jobs want that want more than tags; tags beside a vector are made from that vector."""
        wants = [job.request.want if job.request is not None else () for job in jobs]
        halves, kept = rounded(vectors), {}
        if keeping := [i for i, want in enumerate(wants) if "vector" in want]:
            made = self.kept_tags(halves[keeping], labels, [jobs[i].request for i in keeping])
            kept = dict(zip(keeping, made, strict=True))
        for i, (job, want) in enumerate(zip(jobs, wants, strict=True)):
            if "tags" in want:
                self._set_tags(job, kept.get(i, tags[i]))
            if "embedding" in want:
                job.embedding = tuple(vectors[i].astype(np.float64).round(DIGITS).tolist())
            if i in kept:
                job.vector = to_base64(halves[i])

    def _set_tags(self, job: Job, tags: tuple[Tag, ...]) -> None:
        job.tags, warning = self.fitting(tags)
        if warning is not None:
            job.warnings = (*job.warnings, warning)


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
