"""Tags of label sets of version 2: limits, groups, parents, heads, and the label of unknown images."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiwu.contract import Tag
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.label_files import load_label_set
from tests.support.rule_sets import random_units, read_set, tags_of, text_vector, with_vectors, write_calibration

WORDS = ("cat", "dog", "bird", "car", "bus", "tree")
GROUPS: dict[str, Any] = {
    "animals": {"exclusive": True, "labels": ["cat", "dog", "bird"], "parent": "living"},
    "vehicles": {"exclusive": True, "labels": ["car", "bus"], "parent": "thing"},
    "kinds": {"exclusive": True, "labels": ["living", "thing"]},
}
PARENTS = {"cat": "living", "dog": "living", "bird": "living", "car": "thing", "bus": "thing"}
IMAGES = random_units(40, seed=7)
HEADS = st.sampled_from(["softmax", "z"])


def make_set(**fields: Any) -> LabelSet:
    """A set of version 2 with a calibration where its head needs one."""
    with tempfile.TemporaryDirectory() as folder:
        z = fields.pop("z", 1.0)
        fields = {"labels": list(WORDS), **fields}
        if fields.get("head") == "z" or "figures" in fields:
            figures = fields.pop("figures", {})
            fields["calibration"] = write_calibration(Path(folder), fields, z=z, **figures)
        return read_set(Path(folder), **fields)


def names(tags: tuple[Tag, ...]) -> list[str]:
    """The labels."""
    return [tag.label for tag in tags]


def test_best_text_of_a_label_counts() -> None:
    """The cosine of a label is the largest of its texts, and its score follows from it."""
    image = text_vector("kitten")[None]
    plain = tags_of(make_set(labels=["cat", "dog"]), image)[0]
    more = tags_of(make_set(labels=[{"label": "cat", "texts": ["cat", "kitten"]}, "dog"]), image)[0]
    assert more[0].label == "cat"
    assert more[0].cosine == pytest.approx(1.0, abs=1e-5)
    assert {tag.label: tag.cosine for tag in more}["dog"] == {tag.label: tag.cosine for tag in plain}["dog"]


def test_set_without_rules_has_the_tags_of_version_1(tmp_path: Path) -> None:
    """The same labels, scores and cosines; no new field is set."""
    (tmp_path / "one.yaml").write_text("name: one\nlabels: [cat, dog, bird, car, bus, tree]\n")
    first, second = load_label_set(tmp_path / "one.yaml"), make_set()
    assert tags_of(first, IMAGES, top_k=3) == tags_of(second, IMAGES, top_k=3)


@pytest.mark.parametrize("head", ["softmax", "z"])
def test_z_is_given_by_its_head_only(head: str) -> None:
    """By how many deviations a cosine exceeds its background; the best z comes first and decides."""
    label_set = make_set(head=head, figures={"cat": {"mean": 0.3, "deviation": 0.2}})
    for tags in tags_of(label_set, IMAGES):
        for tag in tags:
            mean, deviation = (0.3, 0.2) if tag.label == "cat" else (0.0, 0.1)
            expected = pytest.approx((tag.cosine - mean) / deviation, abs=1e-4) if head == "z" else None
            assert (tag.z, tag.p) == (expected, None)
            assert head == "softmax" or (tag.z or 0) >= 1.0
        keys = [-(tag.z if tag.z is not None else tag.cosine) for tag in tags]
        assert keys == sorted(keys)


def test_curve_gives_a_probability_that_a_threshold_decides() -> None:
    """A label with a curve is decided by p where it has a threshold; the others by z."""
    figures = {"cat": {"curve": [2.0, -3.0], "threshold": 0.8}, "dog": {"curve": [2.0, -3.0]}}
    label_set = make_set(head="z", figures=figures, z=2.0)
    seen = set()
    for tags in tags_of(label_set, IMAGES):
        for tag in tags:
            assert tag.z is not None
            if tag.label in figures:
                assert tag.p == pytest.approx(1 / (1 + math.exp(3.0 - 2.0 * tag.z)), abs=1e-4)
                assert (tag.p or 0) >= 0.8 if tag.label == "cat" else tag.z >= 2.0
            else:
                assert tag.p is None
            seen.add((tag.label, tag.z < 2.0))
    # 2.0 · 2.19 - 3 is the p of 0.8: the threshold is stricter here than z, and looser where it is lower.
    looser = make_set(
        head="z", figures={"cat": {"curve": [2.0, -3.0]}}, z=2.0, labels=[{"label": "cat", "threshold": 0.1}]
    )
    assert any((tag.z or 0) < 2.0 for tags in tags_of(looser, IMAGES) for tag in tags)
    assert ("dog", False) in seen


def test_request_replaces_the_limits_of_the_set() -> None:
    """A threshold those of p and score; a least cosine all of them."""
    label_set = make_set(labels=[{"label": word, "threshold": 0.9} for word in WORDS])
    strict = tags_of(label_set, IMAGES)
    loose = tags_of(label_set, IMAGES, threshold=0.001)
    every = tags_of(label_set, IMAGES, min_cosine=-1.0)
    assert all(tag.score >= 0.9 for tags in strict for tag in tags)
    assert sum(map(len, strict)) < sum(map(len, loose)) < sum(map(len, every))
    assert all(len(tags) == len(WORDS) for tags in every)
    over = make_set(head="z", z=1.0)
    assert all(len(tags) == len(WORDS) for tags in tags_of(over, IMAGES, min_cosine=-1.0))
    assert tags_of(over, IMAGES, threshold=0.5) == tags_of(over, IMAGES), (
        "no label has a p that it could be compared with"
    )


def test_unknown_label_is_given_only_where_nothing_passes() -> None:
    """It has the score and cosine that it really has, and never stands beside another tag."""
    label_set = make_set(labels=[{"label": word, "threshold": 0.5} for word in WORDS], unknown="other")
    found = tags_of(label_set, IMAGES)
    unknown = [tags for tags in found if label_set.is_unknown(tags)]
    assert 0 < len(unknown) < len(found)
    assert all(names(tags) == ["other"] for tags in unknown)
    assert all("other" not in names(tags) for tags in found if tags not in unknown)
    cosine = float(IMAGES[found.index(unknown[0])] @ text_vector("other"))
    assert unknown[0][0].cosine == pytest.approx(cosine, abs=1e-5)


def test_hidden_labels_compete_and_are_never_given() -> None:
    """In the softmax and in an exclusive group."""
    groups = {"g": {"exclusive": True, "labels": ["cat", "dog"]}}
    shown = make_set(groups=groups)
    hidden = make_set(groups=groups, labels=[{"label": "cat", "hidden": True}, *WORDS[1:]])
    for one, other in zip(tags_of(shown, IMAGES), tags_of(hidden, IMAGES), strict=True):
        assert [tag for tag in one if tag.label != "cat"] == list(other)


@given(HEADS, st.floats(0, 1), st.floats(-1, 1), st.integers(1, 4), st.booleans())
def test_groups_and_parents_hold_for_any_request(
    head: str, threshold: float, min_cosine: float, top_k: int, has_limits: bool
) -> None:
    """At most one label of an exclusive group; a child never comes without its parent."""
    label_set = make_set(head=head, groups=GROUPS, z=0.5)
    fields: dict[str, Any] = {"threshold": threshold, "min_cosine": min_cosine} if has_limits else {}
    for tags in tags_of(label_set, IMAGES, top_k=top_k, **fields):
        got = names(tags)
        assert len(got) == len(set(got))
        for group in GROUPS.values():
            assert len(set(got) & set(group["labels"])) <= 1
        assert all(PARENTS[label] in got for label in got if label in PARENTS)
        assert len([label for label in got if label not in PARENTS.values()]) <= top_k
        assert all(tag.group == next((n for n, g in GROUPS.items() if tag.label in g["labels"]), None) for tag in tags)


@given(HEADS, st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_higher_threshold_never_gives_a_further_tag(head: str, thresholds: list[float]) -> None:
    """Also with exclusive groups: their best label is chosen before any limit."""
    low, high = sorted(thresholds)
    figures = {word: {"curve": [1.5, -1.0 - place / 3]} for place, word in enumerate(WORDS)}
    label_set = make_set(head=head, groups=GROUPS, figures=figures)
    for more, fewer in zip(
        tags_of(label_set, IMAGES, threshold=low), tags_of(label_set, IMAGES, threshold=high), strict=True
    ):
        assert set(names(fewer)) <= set(names(more))


@given(HEADS, st.permutations(WORDS), st.permutations(range(len(IMAGES))))
def test_order_of_labels_and_images_changes_no_tag(head: str, words: list[str], order: list[int]) -> None:
    """Each image gets the same tags, whatever its neighbours are."""
    expected = tags_of(make_set(head=head, groups=GROUPS), IMAGES)
    found = tags_of(make_set(head=head, groups=GROUPS, labels=list(words)), IMAGES[order])
    for place, tags in zip(order, found, strict=True):
        assert names(tags) == names(expected[place])
        assert [tag.cosine for tag in tags] == pytest.approx([tag.cosine for tag in expected[place]], abs=2e-6)
        assert [tag.score for tag in tags] == pytest.approx([tag.score for tag in expected[place]], abs=2e-5)


@given(st.lists(st.sampled_from(["x", "y", "z"]), unique=True, max_size=3))
def test_aliases_change_no_tag(aliases: list[str]) -> None:
    """They are names only: no text of them is encoded."""
    plain, named = make_set(), make_set(labels=[{"label": "cat", "aliases": aliases}, *WORDS[1:]])
    assert tags_of(named, IMAGES) == tags_of(plain, IMAGES)
    assert with_vectors(named).row_words == with_vectors(plain).row_words
    assert named.info.digest == plain.info.digest


def test_scores_are_those_of_a_single_image() -> None:
    """A batch gives each image the tags that it gets alone."""
    label_set = make_set(head="z", groups=GROUPS, unknown="other", z=2.0)
    together = tags_of(label_set, IMAGES, top_k=2)
    for row, tags in enumerate(together):
        alone = tags_of(label_set, IMAGES[row : row + 1], top_k=2)[0]
        assert names(alone) == names(tags)
        assert np.allclose([tag.cosine for tag in alone], [tag.cosine for tag in tags], atol=2e-6)
