"""Label sets: files with errors that name them, vectors computed once, the right head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import shiwu_worker
from shiwu_worker.errors import Rejected
from shiwu_worker.labels import LabelBank, LabelSet, load_label_sets

EMBEDDED = Path(shiwu_worker.__file__).parent / "label_sets"


class Texts:
    """A text encoder that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors that depend on the text."""
        self.calls += 1
        raw = np.array([[len(text), ord(text[0]), 1.0] for text in texts], np.float32)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def make_bank(texts: Texts, *, max_cached: int = 2) -> LabelBank:
    """A bank with the embedded sets."""
    return LabelBank(sets=load_label_sets([EMBEDDED]), default="six-zh", encode_texts=texts, max_cached=max_cached)


def test_the_embedded_sets() -> None:
    """The reference's six words bare, and at least 300 pictograms."""
    sets = load_label_sets([EMBEDDED])
    assert sets["six-zh"].words == ("动物", "人物", "交通工具", "食物", "建筑", "植物")
    assert sets["six-zh"].templates == ("{}",)
    assert len(sets["pictogram-zh"].words) >= 300


def test_vectors_are_averaged_over_templates_and_kept() -> None:
    """Unit vectors; the second use computes nothing; the least recently used set goes first."""
    texts = Texts()
    bank = make_bank(texts)
    found = bank.vectors(LabelSet("x", ("猫", "小狗"), ("{}", "一张{}的图片")))
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0)
    calls = texts.calls
    bank.vectors(LabelSet("other name", ("猫", "小狗"), ("{}", "一张{}的图片"), "sigmoid"))
    assert texts.calls == calls
    for words in (("a",), ("b",)):
        bank.vectors(LabelSet(None, words))
    bank.vectors(LabelSet("x", ("猫", "小狗"), ("{}", "一张{}的图片")))
    assert texts.calls > calls + 2


def test_what_a_request_means() -> None:
    """Nothing is the default set, a name a set, words themselves; the head may be chosen."""
    bank = make_bank(Texts())
    assert bank.resolve(None).name == "six-zh"
    assert bank.resolve("pictogram-zh").name == "pictogram-zh"
    assert bank.resolve(("猫",)).words == ("猫",)
    chosen = bank.resolve("six-zh", "sigmoid")
    assert (chosen.head, chosen.vectors_key) == ("sigmoid", bank.resolve(None).vectors_key)
    assert chosen.info.digest != bank.resolve(None).info.digest
    with pytest.raises(Rejected, match="expected one of pictogram-zh, six-zh"):
        bank.resolve("none")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("name: a\nlabels: []", "labels"),
        ("name: a\nlabels: [x, x]", "once"),
        ("name: a\nlabels: [x]\ntemplates: ['no place']", "exactly one"),
        ("name: a\nlabels: [x]\nlabel: y", "label"),
        ("labels: [x]", "name"),
        ("name: a\nlabels: [x]\nhead: relu", "head"),
        ("[", "YAML"),
        ("", "file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, wrong: str) -> None:
    """The error says which file, and what in it."""
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        load_label_sets([tmp_path])
    assert wrong in str(caught.value)
