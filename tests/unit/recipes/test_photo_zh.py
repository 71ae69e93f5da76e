"""The parts of recipes.photo_zh that need no package: vectors, texts, pictures, comparisons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes.photo_zh import vectors, vision
from recipes.photo_zh.build import by_count
from recipes.photo_zh.compare import Comparison, compare
from recipes.photo_zh.evaluate import area_under_curve
from recipes.photo_zh.evaluate_texts import RARE_COUNT, rare_words
from recipes.photo_zh.tables import Vocabulary
from recipes.photo_zh.text import Examples, known_head, make_tokenizer
from recipes.photo_zh.vectors import DIM


def test_cosines_rank_words_as_the_classifier_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its biases are, where its weights have no more directions than vectors have."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(400, 300)) @ rng.normal(size=(300, vision.FEATURES))
    classifier = np.c_[weights, rng.normal(size=400) * 100]
    monkeypatch.setattr(vectors, "learn_groups", lambda *_: classifier[:1])
    pool = rng.normal(size=(20, vision.FEATURES))
    words = {f"w{index}": frozenset({index}) for index in range(400)} | {"人物": frozenset({0, 1})}
    space = vectors.make_space(words, classifier, pool, np.arange(20) < 10)
    features = np.c_[rng.normal(size=(30, vision.FEATURES)), np.ones(30), np.zeros((30, 7))]
    pictures = features @ space.projection.T
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    cosines = pictures @ np.stack([space.vectors[f"w{index}"] for index in range(400)]).T
    logits = features[:, : vision.FEATURES + 1] @ classifier.T
    assert (np.argsort(cosines, axis=1) == np.argsort(logits, axis=1)).all()
    assert all(np.linalg.norm(vector) == pytest.approx(1) for vector in [*space.vectors.values(), space.nothing])
    assert (pictures @ space.nothing < pictures @ space.vectors["未知"]).all()
    assert space.projection.shape == (vectors.DIM, vision.TOP_CHANNELS)


def test_tokenizer_takes_the_longest_known_word() -> None:
    """Other words fall into characters, and characters that it never saw are unknown."""
    tokenizer = make_tokenizer(["狗", "热狗", "T恤"], ["电", "脑"])
    assert tokenizer.tokenize("热狗") == ["热狗"]
    assert tokenizer.tokenize("一只狗") == ["一", "只", "狗"]
    assert tokenizer.tokenize("t恤电脑") == ["t恤", "电", "脑"]
    assert tokenizer.tokenize("蘑") == ["[UNK]"]


def test_unknown_words_get_the_vector_of_what_they_end_with() -> None:
    """A single character counts only where it names a kind of thing."""
    known = {"狗": 1, "汽车": 2, "山": 3}
    assert [known_head(word, known) for word in ("牧羊狗", "电动汽车", "江山", "宪法")] == ["狗", "汽车", "", ""]


def test_examples_mix_known_and_unknown_words() -> None:
    """Every third text is unknown, and gets the low vector."""
    one, nothing = np.eye(DIM)[0], np.eye(DIM)[1]
    examples = Examples({"猫": one}, nothing, ["宪法", "猫", "一二三四五六七"], seed=0)
    assert [word for word, _ in examples.strange] == ["宪法"]
    texts, targets = examples.draw(6)
    assert ["宪法" in text for text in texts] == [False, False, True] * 2
    assert targets.argmax(1).tolist() == [0, 0, 1] * 2


def test_common_words_come_by_their_counts() -> None:
    """Without numbers and punctuation."""
    assert by_count("猫 5 n\n狗 9 n\n3.5 99 m\n") == ["狗", "猫"]


def test_rare_words_are_spread_and_name_no_known_thing() -> None:
    """At most RARE_COUNT, of two to four characters."""
    vocabulary = Vocabulary({"狗": frozenset({1})}, (), ())
    assert rare_words(["牧羊狗", "宪", "宪法", "经济学原理", "量子"], vocabulary) == ["宪法", "量子"]
    many = rare_words([f"词{chr(0x4E00 + number)}" for number in range(1200)], vocabulary)
    assert (len(many), many[0], many[1]) == (RARE_COUNT, "词一", "词丂")


def test_a_cut_out_picture_stands_on_near_white(tmp_path: Path) -> None:
    """With a margin around it."""
    Image.new("RGBA", (100, 50), (255, 0, 0, 255)).save(tmp_path / "a.png")
    image = vision.open_photo(tmp_path, "a.png")
    assert image.size == (114, 114)
    assert image.getpixel((0, 0)) == (250, 250, 250)
    assert image.getpixel((57, 57)) == (255, 0, 0)


def test_pixels_are_the_centre_of_the_picture() -> None:
    """Shortest edge 224, then the middle."""
    image = Image.new("RGB", (896, 448))
    image.paste((254, 254, 254), (224, 0, 672, 448))
    found = vision.pixels(image)
    assert found.shape == (3, vision.SIZE, vision.SIZE)
    assert float(found[:, :, 10:-10].min()) == pytest.approx((254 / 255 - vision.MEAN) / vision.STD, abs=1e-5)
    assert [view.size for view in vision.views(image)] == [(896, 448), (358, 358), (403, 403), (448, 448)]


def test_area_under_curve_counts_ties_half() -> None:
    """1 where all are above."""
    assert area_under_curve(np.float32([3, 4]), np.float32([1, 2])) == 1
    assert area_under_curve(np.float32([1]), np.float32([1])) == 0.5


def test_equal_folders_are_byte_equal(tmp_path: Path) -> None:
    """The model card is written by hand and does not count."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b" / "MODEL_CARD.md").write_text("#")
    assert str(compare(tmp_path / "a", tmp_path / "b", tmp_path)) == "byte-equal: every file is the shipped one"


@pytest.mark.parametrize(("cosine", "is_equal"), [(0.99995, True), (0.9998, False)])
def test_other_bytes_need_equal_vectors(cosine: float, is_equal: bool) -> None:
    """At least 0.9999, over words and over photographs."""
    found = Comparison(("model.safetensors",), words=1.0, photos=cosine)
    assert found.is_equal is is_equal
    assert str(found).startswith("vector-equal" if is_equal else "DIFFERENT")
