"""Labels that a model cannot read or cannot distinguish are found, and others are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shiwu_worker.checkpoints.checkpoint_files import read_checkpoint
from shiwu_worker.jobs.label_checks import LabelFindings, LabelTokens, check_labels
from shiwu_worker.stages.encode.checkpoint import TextEncoder, load_model
from tests.support.encoders import PLACES, make_encoder, make_model, saved
from tests.support.pictogram import PICTOGRAM_ZH


def random_units(count: int, width: int = 16) -> NDArray[np.float32]:
    """Random unit vectors."""
    raw = np.random.default_rng(3).standard_normal((count, width)).astype(np.float32)
    unit: NDArray[np.float32] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return unit


def readable(count: int) -> list[LabelTokens]:
    """Different tokens for each label."""
    return [LabelTokens((index,), is_readable=True) for index in range(count)]


def test_different_labels_have_no_findings() -> None:
    """Vectors that are near each other are still different."""
    vectors = random_units(3)
    vectors[2] = vectors[1] + np.float32(1e-3)
    found = check_labels(["a", "b", "c"], tokens=readable(3), vectors=vectors)
    assert found == LabelFindings()


def test_equal_tokens_and_equal_vectors_make_one_group() -> None:
    """a and c share tokens, c and e share a vector: a, c and e are one group, in the order of the set."""
    tokens, vectors = readable(6), random_units(6)
    tokens[2] = tokens[0]
    vectors[4] = vectors[2] + np.float32(1e-7)
    found = check_labels(list("abcdef"), tokens=tokens, vectors=vectors)
    assert found == LabelFindings(alike=(("a", "c", "e"),))


def test_unreadable_labels_are_not_reported_as_alike() -> None:
    """Their tokens and vectors are equal because they are unreadable."""
    tokens, vectors = readable(4), random_units(4)
    tokens[1] = tokens[3] = LabelTokens((9,), is_readable=False)
    vectors[3] = vectors[1]
    found = check_labels(list("abcd"), tokens=tokens, vectors=vectors)
    assert found == LabelFindings(unreadable=("b", "d"))


def test_a_few_equal_vectors_among_many_are_found() -> None:
    """A set may hold more labels than can be compared each with each."""
    vectors = random_units(20_000, 64)
    vectors[19_000], vectors[7] = vectors[12], vectors[12]
    found = check_labels([str(n) for n in range(20_000)], tokens=readable(20_000), vectors=vectors)
    assert found.alike == (("7", "12", "19000"),)


def test_all_labels_equal_make_one_group() -> None:
    """A text tower that ignores its input gives every label the same vector."""
    vectors = np.tile(random_units(1), (300, 1))
    found = check_labels([str(n) for n in range(300)], tokens=readable(300), vectors=vectors)
    assert [len(group) for group in found.alike] == [300]


@pytest.mark.parametrize("kind", ["clip", "siglip", "altclip"])
def test_encoder_reports_which_labels_it_can_read(kind: str, tmp_path: Path) -> None:
    """The tiny checkpoint knows small letters and two words; only SigLIP lowers the case."""
    encoder = make_encoder(saved(make_model(kind), tmp_path))
    labels = ["abc", "鼠", "熊", "鼠a", "AAA", "a" * 50, "a" * PLACES]
    tokens = encoder.label_tokens(labels)
    assert [one.is_readable for one in tokens] == [True, False, False, True, True, True, True]
    found = check_labels(labels, tokens=tokens, vectors=encoder.encode_texts(labels))
    assert found.unreadable == ("鼠", "熊")
    assert ("a" * 50, "a" * PLACES) in found.alike
    assert encoder.label_tokens([]) == []


def words_of(texts: TextEncoder, labels: Sequence[str]) -> LabelFindings:
    """The findings of the embedded model."""
    return check_labels(labels, tokens=texts.label_tokens(labels), vectors=texts.encode(labels))


def test_embedded_model_reads_its_own_words_only() -> None:
    """The README's default labels are fine; an English word and an emoji are not."""
    folder = PICTOGRAM_ZH
    checkpoint = read_checkpoint(folder)
    texts = TextEncoder(load_model(checkpoint), checkpoint)
    assert words_of(texts, ["动物", "人物", "交通工具", "食物", "建筑", "植物"]) == LabelFindings()
    assert words_of(texts, ["熊猫", "zzz", "🦄"]).unreadable == ("zzz", "🦄")
