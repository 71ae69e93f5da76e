"""Scores: the two heads, the best tags, and no answer that is a neighbour's."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiwu.contract import Head, WarningCode
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.scorer import MAX_TAGS_BYTES, score, smallest, top_tags
from tests.support.scored_jobs import MODEL, SCORER, encoded, make_job, units


@pytest.mark.parametrize(("head", "bias"), [("softmax", None), ("sigmoid", -12.93), ("sigmoid", None)])
def test_heads_equal_those_of_torch(head: Head, bias: float | None) -> None:
    """Both heads agree with torch's functions in double precision."""
    vectors, labels = units(5), units(7, seed=1)
    probabilities, cosines = score(vectors, labels, head=head, scale=100.0, bias=bias)
    logits = torch.from_numpy(vectors @ labels.T).double() * 100 + (bias or 0.0)
    expected = logits.softmax(dim=1) if head == "softmax" else logits.sigmoid()
    np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(cosines, vectors @ labels.T)
    assert probabilities.dtype == cosines.dtype == np.float32


@given(
    scale=st.floats(0.01, 1e6),
    bias=st.one_of(st.none(), st.floats(-1e6, 1e6)),
    seed=st.integers(0, 1000),
    head=st.sampled_from(["softmax", "sigmoid"]),
)
def test_no_scale_overflows(scale: float, bias: float | None, seed: int, head: Head) -> None:
    """Probabilities lie in 0 to 1 for any scale and bias, softmax sums to 1, and no warning is raised."""
    probabilities, _ = score(units(3, seed=seed), units(4, seed=seed + 1), head=head, scale=scale, bias=bias)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    if head == "softmax":
        assert probabilities.sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def tags(
    values: list[float], *, top_k: int = 10, threshold: float = 0.0, min_cosines: list[float] | None = None
) -> list[tuple[str, float]]:
    """The tags of these probabilities over the words a, b, c, …; the cosines are half of them."""
    row = np.array(values, np.float32)
    words = "abcdefgh"[: len(values)]
    least = None if min_cosines is None else np.array([min_cosines])
    options: Any = {"top_k": [top_k], "threshold": [threshold], "min_cosines": least}
    [found] = top_tags(row[None], row[None] * np.float32(0.5), words, **options)
    assert [tag.cosine for tag in found] == pytest.approx([tag.score / 2 for tag in found], abs=1e-6)
    return [(tag.label, tag.score) for tag in found]


def test_best_labels_come_first() -> None:
    """Sorted by score; equal scores keep the label set's order; a large top_k gives all there are."""
    assert tags([0.25, 0.5, 0.25]) == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
    assert tags([0.25, 0.5, 0.25], top_k=2) == [("b", 0.5), ("a", 0.25)]


def test_threshold_is_a_least_score() -> None:
    """A score at the threshold stays, one under it goes; there may be no tag at all."""
    assert tags([0.25, 0.5, 0.25], threshold=0.25) == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
    assert tags([0.25, 0.5, 0.25], threshold=0.5) == [("b", 0.5)]
    assert tags([0.25, 0.5, 0.25], threshold=0.75) == []


def test_labels_have_their_own_least_cosine() -> None:
    """A label under its bound makes room for the next one; the score's threshold holds as well."""
    values = [0.25, 0.5, 0.375, 0.125]
    assert tags(values, min_cosines=[-1, 0.3, -1, -1], top_k=2) == [("c", 0.375), ("a", 0.25)]
    assert tags(values, min_cosines=[-1, 0.25, 0.2, -1], threshold=0.25) == [("b", 0.5), ("a", 0.25)]
    assert tags(values, min_cosines=[1, 1, 1, 1]) == []


def test_labels_with_equal_scores_are_ordered_by_cosine() -> None:
    """A sigmoid without a bias rounds every score to 1; the first labels of the list must not win for that."""
    vectors, labels = units(1), units(12, seed=1)
    labels[7] = vectors[0]
    probabilities, cosines = score(np.abs(vectors), np.abs(labels), head="sigmoid", scale=100.0, bias=None)
    assert (probabilities == 1).all()
    [found] = top_tags(probabilities, cosines, "abcdefghijkl", top_k=[12], threshold=[0.0])
    assert found[0].label == "h"
    assert [tag.cosine for tag in found] == sorted((tag.cosine for tag in found), reverse=True)


def test_mixed_batch_gives_each_job_its_own_tags() -> None:
    """Jobs of two label sets and two heads in one batch score as each would alone."""
    left = encoded(LabelSet("left", ("a", "b", "c")), seed=1)
    right = encoded(LabelSet("right", ("x", "y"), head="sigmoid"), seed=2)
    vectors = units(6)
    mixed = [make_job(n, (left, right)[n % 2], want=["tags", "embedding"]) for n in range(6)]
    SCORER.score(mixed, vectors)
    for row, job in enumerate(mixed):
        alone = make_job(row, (left, right)[row % 2], want=["tags", "embedding"])
        SCORER.score([alone], vectors[row : row + 1])
        assert job.tags is not None
        assert alone.tags is not None
        assert [tag.label for tag in job.tags] == [tag.label for tag in alone.tags]
        assert [tag.score for tag in job.tags] == pytest.approx([tag.score for tag in alone.tags], abs=2e-6)
        assert job.embedding == pytest.approx(tuple(vectors[row]), abs=1e-6)
        assert job.model == MODEL


def test_job_gets_what_it_requests() -> None:
    """top_k and threshold are the request's, and an embedding is given only when asked for."""
    labels = encoded(LabelSet("left", ("a", "b", "c")), seed=1)
    jobs = [
        make_job(0, labels, top_k=1),
        make_job(1, labels, want=["embedding"]),
        make_job(2, labels, threshold=1.0),
    ]
    SCORER.score(jobs, units(3))
    assert [None if job.tags is None else len(job.tags) for job in jobs] == [1, None, 0]
    assert [job.embedding is None for job in jobs] == [True, False, True]


def cosines_of(job: Job) -> dict[str, float]:
    """The tags of a job."""
    assert job.tags is not None
    return {tag.label: tag.cosine for tag in job.tags}


def test_request_replaces_the_least_cosines_of_its_set() -> None:
    """Jobs of one batch with their own bound and with that of their label set."""
    vectors = np.repeat(units(1), 3, axis=0)
    free = make_job(0, encoded(LabelSet("left", tuple("abcd")), seed=1), top_k=9)
    SCORER.score([free], vectors[:1])
    [(_, first), (second, second_cosine), (third, third_cosine), _] = cosines_of(free).items()
    least = tuple((third_cosine + 0.001) if label == third else -1.0 for label in "abcd")
    labels = encoded(LabelSet("left", tuple("abcd"), min_cosines=least), seed=1)
    asked = [{}, {"min_cosine": second_cosine - 0.001}, {"min_cosine": -1}]
    jobs = [make_job(number, labels, top_k=9, **fields) for number, fields in enumerate(asked)]
    SCORER.score(jobs, vectors)
    assert [third in cosines_of(job) for job in jobs] == [False, False, True]
    assert [len(cosines_of(job)) for job in jobs] == [3, 2, 4]
    assert max(cosines_of(jobs[1]).values()) == pytest.approx(first)
    assert second in cosines_of(jobs[1])


def test_label_set_may_have_its_own_scale_and_bias() -> None:
    """Its scores are sigmoid(scale · cosine + bias) with its own numbers, with a model that has no bias."""
    labels = encoded(LabelSet("left", ("a", "b"), head="sigmoid", scale=10.0, bias=-2.0), seed=1)
    job = make_job(0, labels)
    SCORER.score([job], units(1))
    assert job.tags is not None
    for tag in job.tags:
        assert tag.score == pytest.approx(1 / (1 + np.exp(2 - 10 * tag.cosine)), abs=1e-5)


def test_vectors_and_jobs_must_match() -> None:
    """One vector too few would give jobs their neighbours' tags: it is an error."""
    labels = encoded(LabelSet("left", ("a", "b", "c")), seed=1)
    with pytest.raises(ValueError, match="expected 2 vectors"):
        SCORER.score([make_job(n, labels) for n in range(2)], units(1))


@given(
    seed=st.integers(0, 1000),
    levels=st.integers(1, 1000),
    count=st.sampled_from([1, 2, 5, 40, 60, 200, 500]),
    share=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_best_labels_of_a_large_set_equal_a_full_sort(seed: int, levels: int, count: int, share: float) -> None:
    """With few or many equal cosines, and with labels below their bound, whose keys are infinite."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, levels, (32, 200)).astype(np.float32)
    keys[random.random(keys.shape) < share] = np.inf
    keys[0] = 1.0
    best, expected = smallest(keys, count), np.argsort(keys, axis=1, kind="stable")[:, :count]
    assert best.shape == expected.shape
    for row, (ours, theirs) in enumerate(zip(best, expected, strict=True)):
        finite = np.isfinite(keys[row, theirs]).sum()
        assert ours[:finite].tolist() == theirs[:finite].tolist()
        assert len(set(ours)) == len(ours)


def test_list_of_tags_that_is_too_large_is_cut_with_a_warning() -> None:
    """A small message with a thousand long labels must not make an answer of 400 KB."""
    words = tuple(f"{n:03}" + "猫" * 97 for n in range(1000))
    job = make_job(0, encoded(LabelSet("long", words), seed=1), top_k=1000)
    SCORER.score([job], units(1))
    assert job.tags is not None
    assert job.tags == tuple(sorted(job.tags, key=lambda tag: -tag.cosine))
    size = len(msgspec.json.encode(job.tags))
    assert 0.8 * MAX_TAGS_BYTES < size <= MAX_TAGS_BYTES
    [warning] = job.warnings
    assert warning.code is WarningCode.TAGS_CUT
    assert f"the first {len(job.tags)} of 1000 tags" in warning.message


def test_list_of_tags_that_fits_is_whole() -> None:
    """Also where it is long enough to be measured."""
    job = make_job(0, encoded(LabelSet("many", tuple(f"word {n}" for n in range(1000))), seed=1), top_k=1000)
    SCORER.score([job], units(1))
    assert job.tags is not None
    assert len(job.tags) == 1000
    assert job.warnings == ()
