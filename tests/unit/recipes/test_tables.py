"""The tables of recipes.photo_zh: classes, groups, photographs, splits."""

from __future__ import annotations

import re

import pytest
import yaml
from recipes.packages import read_packages, read_rows
from recipes.photo_zh.checkpoint import ROOT
from recipes.photo_zh.tables import DATA, SIX, UNKNOWN, Vocabulary, read_photos, read_pool, read_vocabulary

LABEL_SETS = ROOT / "worker/shiwu_worker/data/label_sets"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """The words that the model knows."""
    return read_vocabulary()


def test_every_class_has_a_word_of_its_own(vocabulary: Vocabulary) -> None:
    """1,000 classes in ImageNet's order."""
    assert [row[0] for row in read_rows(DATA / "classes.tsv")] == [str(index) for index in range(1000)]
    assert len(vocabulary.own) == 1000
    assert all(index in vocabulary.words[word] for index, word in enumerate(vocabulary.own))


def test_the_six_categories_are_groups(vocabulary: Vocabulary) -> None:
    """Each has several classes."""
    assert set(SIX) <= set(vocabulary.groups)
    assert all(len(vocabulary.words[word]) > 5 for word in SIX)


def test_is_right_wants_a_shared_class_or_the_whole_group() -> None:
    """`~鸟` is right for 鸟 and 动物, not for 鸡."""
    words = {"动物": frozenset({1, 2, 3}), "鸟": frozenset({1, 2}), "鸡": frozenset({1}), "狗": frozenset({3})}
    vocabulary = Vocabulary(words, (), ())
    assert [word for word in words if vocabulary.is_right(word, ("~鸟",))] == ["动物", "鸟"]
    assert [word for word in words if vocabulary.is_right(word, ("鸡",))] == ["动物", "鸟", "鸡"]


@pytest.mark.parametrize("name", ["everyday-zh", "photo-zh"])
def test_label_sets_hold_known_words_only(name: str, vocabulary: Vocabulary) -> None:
    """And none twice."""
    labels = yaml.safe_load((LABEL_SETS / f"{name}.yaml").read_text(encoding="utf-8"))["labels"]
    assert len(labels) == len(set(labels)) > 200
    assert set(labels) <= {*vocabulary.words, *UNKNOWN}


def test_photographs_have_known_words_and_packages(vocabulary: Vocabulary) -> None:
    """Where no word fits, there is none; elsewhere at least one."""
    packages = read_packages()
    for photo in read_photos():
        assert photo.package in packages
        assert photo.kind in {"scene", "cutout", "none"}
        assert bool(photo.answers) == (photo.kind != "none")
        assert {word.removeprefix("~") for word in photo.answers} <= set(vocabulary.words)
        assert photo.category is None or photo.category in SIX


def test_splits_are_disjoint_and_both_large() -> None:
    """What settings were chosen on is not reported as if it were new, and nothing that was learned from is either."""
    photos = read_photos()

    def files(split: str) -> set[tuple[str, str]]:
        return {(photo.package, photo.file) for photo in photos if photo.split == split}

    assert {photo.split for photo in photos} == {"choice", "report"}
    assert len(files("choice")) > 300
    assert len(files("report")) > 100
    pool = {(photo.package, photo.file) for photo in read_pool()}
    assert not files("choice") & files("report")
    assert not pool & (files("choice") | files("report"))
    assert len(photos) == len(files("choice")) + len(files("report"))


def test_pool_has_people_and_others() -> None:
    """People come first: the recipe repeats their pictures in this order."""
    pool = read_pool()
    assert {photo.package for photo in pool} <= set(read_packages())
    assert [photo.is_person for photo in pool] == sorted((photo.is_person for photo in pool), reverse=True)
    assert 20 < sum(photo.is_person for photo in pool) < len(pool) - 10


def test_the_build_environment_is_exact() -> None:
    """Every line pins one version that a public index has."""
    lines = (DATA.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    assert {"torch", "transformers", "numpy", "pillow"} <= {line.partition("==")[0] for line in pins}
