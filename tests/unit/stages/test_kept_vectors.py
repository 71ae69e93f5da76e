"""Jobs that want their vector: the vector in the answer, and tags that can be computed from it again, bit by bit."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.kept_vectors import LABELS_AT_ONCE, kept_cosines, rounded
from shiwu_worker.stages.score.scorer import Scorer
from tests.support.scored_jobs import MODEL, SCORER, encoded, make_job, units

WIDTH = 512
COUNT = 67
WORDS = tuple(f"w{n}" for n in range(300))
BOTH: dict[str, Any] = {"want": ["tags", "vector"]}


def halves_of(job: Job) -> NDArray[np.float16]:
    """The vector of an answer, read as the documents say."""
    assert job.vector is not None
    return np.frombuffer(base64.b64decode(job.vector), "<f2")


def test_vector_is_the_float16_of_the_unit_vector() -> None:
    """Beside tags, or alone; a job that does not want it has none."""
    labels, vectors = encoded(LabelSet("left", ("a", "b")), seed=1), units(3)
    jobs = [make_job(0, labels, **BOTH), make_job(1, labels, want=["vector"]), make_job(2, labels)]
    SCORER.score(jobs, vectors)
    assert [job.tags is None for job in jobs] == [False, True, False]
    assert [job.embedding for job in jobs] == [None] * 3
    assert jobs[2].vector is None
    for job, vector in zip(jobs[:2], vectors, strict=False):
        np.testing.assert_array_equal(halves_of(job), vector.astype(np.float16))


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_tags_beside_a_vector_do_not_depend_on_the_batch(head: Any) -> None:
    """In a batch, alone, and computed again from the answers' vectors: the same tags, bit by bit."""
    labels = encoded(LabelSet("many", WORDS, head=head), seed=1, width=WIDTH)
    vectors = units(COUNT, WIDTH)
    batch = [make_job(n, labels, top_k=20, **(BOTH if n % 3 else {})) for n in range(COUNT)]
    SCORER.score(batch, vectors)
    wanting = [n for n in range(COUNT) if n % 3]
    alone = [make_job(n, labels, top_k=20, **BOTH) for n in wanting]
    for job, n in zip(alone, wanting, strict=True):
        SCORER.score([job], vectors[n : n + 1])
    assert [job.tags for job in alone] == [batch[n].tags for n in wanting]
    halves = np.stack([halves_of(batch[n]) for n in wanting])
    again = SCORER.kept_tags(halves[::-1], labels, [batch[n].request for n in wanting][::-1])
    assert again[::-1] == [batch[n].tags for n in wanting]


def test_rounding_moves_a_cosine_by_little() -> None:
    """The tags of a job that wants its vector are those of one that does not, up to the fourth decimal."""
    vectors, labels = units(COUNT, WIDTH), units(len(WORDS), WIDTH, seed=1)
    np.testing.assert_allclose(kept_cosines(rounded(vectors), labels), vectors @ labels.T, atol=1e-4)


def test_labels_are_compared_in_portions_of_any_size() -> None:
    """More labels than one portion holds, and a last portion that is not full."""
    vectors, labels = rounded(units(3)), units(2 * LABELS_AT_ONCE + 5, seed=1)
    expected = vectors.astype(np.float64) @ labels.T.astype(np.float64)
    np.testing.assert_array_equal(kept_cosines(vectors, labels), expected.astype(np.float32))


def test_long_list_beside_a_vector_is_cut_once() -> None:
    """One warning, and no tags above the limit."""
    scorer = Scorer(scale=20.0, bias=None, model=MODEL, max_tags_bytes=400)
    job = make_job(0, encoded(LabelSet("many", WORDS), seed=1), top_k=1000, **BOTH)
    scorer.score([job], units(1))
    assert job.tags is not None
    assert 0 < len(job.tags) < 10
    assert [str(warning.code) for warning in job.warnings] == ["tags_cut"]


def test_bounds_hold_for_tags_beside_a_vector() -> None:
    """Threshold, least cosine and top_k of the request."""
    labels, vectors = encoded(LabelSet("left", WORDS), seed=1), units(1)
    everything = make_job(0, labels, top_k=len(WORDS), **BOTH)
    SCORER.score([everything], vectors)
    assert everything.tags is not None
    bound = everything.tags[4].cosine - 1e-7
    jobs = [
        make_job(1, labels, top_k=3, **BOTH),
        make_job(2, labels, top_k=50, min_cosine=bound, **BOTH),
        make_job(3, labels, top_k=50, threshold=1.0, **BOTH),
    ]
    SCORER.score(jobs, np.repeat(vectors, 3, axis=0))
    assert [job.tags for job in jobs] == [everything.tags[:3], everything.tags[:5], ()]
