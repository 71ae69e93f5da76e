"""Measures the text tower: whether it knows its words in a sentence, and gives low scores to words that it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from recipes.photo_zh.checkpoint import Checkpoint
from recipes.photo_zh.tables import Vocabulary
from recipes.photo_zh.text import TEMPLATES, known_head

LEARNED: Final = TEMPLATES[:4]
NEW: Final = ("拍摄的{}照片", "我看到了{}", "请看这张有{}的图", "{}，摄于昨天")
"""The recipe trains with none of these."""
LACKED: Final = ("树", "天空", "日落", "云", "鹿", "长颈鹿", "海豚", "犀牛", "葡萄", "剪刀", "樱桃", "森林")
"""Things that photographs show and ImageNet-1k has no class for."""
RARE_COUNT: Final = 500


@dataclass(frozen=True, slots=True)
class Scenes:
    """Photographs in which something can be named."""

    vectors: NDArray[np.float32]
    """(n, 320)."""
    best_of_six: NDArray[np.float32]
    """The highest logit of six-zh on each, (n,)."""


def text_table(
    checkpoint: Checkpoint, vocabulary: Vocabulary, scenes: Scenes, ranked_out: Sequence[str]
) -> Iterator[str]:
    """The lines of the table.

    Args:
        ranked_out: dictionary words that are too rare for the recipe to learn from.
    """
    yield "| texts | number | result |"
    yield "|---|---|---|"
    words = list(vocabulary.words)
    alone = checkpoint.encode_texts(words)
    for name, templates in (
        ("known words alone", ("{}",)),
        ("in templates that it learned", LEARNED),
        ("in sentences that it did not learn", NEW),
    ):
        right = sum(_found(checkpoint, vocabulary, words, alone, template) for template in templates)
        count = len(words) * len(templates)
        yield f"| {name} | {count} | nearest to their own word: {right} = {right / count:.1%} |"
    rare = rare_words(ranked_out, vocabulary)
    for name, texts in (("rare words of a dictionary, not learned", rare), (f"{'、'.join(LACKED)}", LACKED)):
        above = _above(checkpoint, scenes, texts)
        pairs = len(texts) * len(scenes.vectors)
        yield (
            f"| {name} | {len(texts)} | above the best of six-zh on a photograph: {above} of {pairs} pairs "
            f"= {above / pairs:.1%} |"
        )


def rare_words(ranked_out: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Some of these words, evenly spread, without kinds of known things such as 牧羊狗."""
    fit = [word for word in ranked_out if 2 <= len(word) <= 4 and not known_head(word, vocabulary.words)]
    return fit[:: max(1, len(fit) // RARE_COUNT)][:RARE_COUNT]


def _found(
    checkpoint: Checkpoint, vocabulary: Vocabulary, words: Sequence[str], alone: NDArray[np.float32], template: str
) -> int:
    """How many words are nearest, in this template, to a word with the same classes."""
    vectors = checkpoint.encode_texts([template.format(word) for word in words])
    nearest = (vectors @ alone.T).argmax(1)
    return sum(
        vocabulary.words[words[found]] == vocabulary.words[word] for word, found in zip(words, nearest, strict=True)
    )


def _above(checkpoint: Checkpoint, scenes: Scenes, texts: Sequence[str]) -> int:
    """How many pairs of a photograph and a text have a higher logit than the best of six-zh on the photograph."""
    logits = checkpoint.scale * scenes.vectors @ checkpoint.encode_texts(texts).T
    return int((logits > scenes.best_of_six[:, None]).sum())
