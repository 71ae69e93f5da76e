"""The tables of data/: which of ImageNet's classes each Chinese word means, photographs, label sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recipes.packages import read_rows

DATA: Final = Path(__file__).with_name("data")
UNKNOWN: Final = ("未知", "未知物体", "其他", "看不出")
"""Words whose logit is the same on every photograph, so that they win where nothing else fits."""
SIX: Final = ("动物", "人物", "交通工具", "食物", "建筑", "植物")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that the model knows."""

    words: dict[str, frozenset[int]]
    """Each word with the indices of its classes."""
    own: tuple[str, ...]
    """One word for each class, in the order of the classes."""
    groups: tuple[str, ...]
    """One word for each group."""

    @property
    def full(self) -> tuple[str, ...]:
        """The words of the label set photo-zh."""
        return tuple(dict.fromkeys([*self.groups, *self.own]))

    def is_right(self, word: str, answers: tuple[str, ...]) -> bool:
        """Whether the word shares a class with an answer, or holds the whole group of an answer that begins with ~."""
        return any(
            self.words[answer[1:]] <= self.words[word]
            if answer.startswith("~")
            else bool(self.words[answer] & self.words[word])
            for answer in answers
        )


@dataclass(frozen=True, slots=True)
class Photo:
    """A test photograph and what is right for it."""

    split: str
    """`choice`: settings were chosen on it; `report`: it was used for nothing but the report."""
    kind: str
    """`scene`, `cutout` on white, or `none`: no word fits."""
    package: str
    file: str
    answers: tuple[str, ...]
    category: str | None


@dataclass(frozen=True, slots=True)
class PoolPhoto:
    """A photograph that the recipe learns from."""

    is_person: bool
    package: str
    file: str


def read_vocabulary(folder: Path = DATA) -> Vocabulary:
    """Read classes.tsv and groups.tsv."""
    names = [row[3].split("/") for row in read_rows(folder / "classes.tsv")]
    classes: dict[str, set[int]] = {}
    for index, words in enumerate(names):
        for word in words:
            classes.setdefault(word, set()).add(index)
    groups: dict[str, set[int]] = {}
    group_rows = read_rows(folder / "groups.tsv")
    for joined, members in group_rows:
        found: set[int] = set()
        for part in members.split():
            found |= _members(part, groups, classes)
        groups |= dict.fromkeys(joined.split("/"), found)
    all_words = {word: frozenset(found) for word, found in {**classes, **groups}.items()}
    own = tuple(next((w for w in words if all_words[w] == {index}), words[0]) for index, words in enumerate(names))
    return Vocabulary(all_words, own, tuple(row[0].split("/")[0] for row in group_rows))


def _members(part: str, groups: dict[str, set[int]], classes: dict[str, set[int]]) -> set[int]:
    """The classes of `7`, of `7-24`, of a group above or of a class."""
    first, _, last = part.partition("-")
    if first.isdigit():
        return set(range(int(first), int(last or first) + 1))
    return groups.get(part) or classes[part]


def read_photos(folder: Path = DATA) -> list[Photo]:
    """Read photos.tsv."""
    return [
        Photo(split, kind, package, file, () if words == "-" else tuple(words.split(",")), _category(category))
        for split, kind, package, file, words, category in read_rows(folder / "photos.tsv")
    ]


def read_pool(folder: Path = DATA) -> list[PoolPhoto]:
    """Read pool.tsv: people first, then others."""
    return [PoolPhoto(kind == "people", package, file) for kind, package, file in read_rows(folder / "pool.tsv")]


def _category(text: str) -> str | None:
    return None if text == "-" else text
