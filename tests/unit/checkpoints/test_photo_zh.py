"""The model photo-zh through the worker's own parts: its folder loads, and the sample photographs get their words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shiwu_worker
from shiwu.contract import ErrorCode
from shiwu_worker.errors import Rejected
from shiwu_worker.stages.decode.decoder import DecodeLimits, decode
from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.scorer import score

DATA = Path(shiwu_worker.__file__).parent / "data"
MODEL = DATA / "photo_zh"
PHOTOS = Path(__file__).resolve().parents[3] / "demo" / "photos"
SAMPLES: list[dict[str, Any]] = json.loads((PHOTOS / "samples.json").read_text(encoding="utf-8"))
LIMITS = DecodeLimits(max_pixels=50_000_000, max_side=10_000, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF"))
SPEC = read_image_spec(MODEL)
LEAST_FIRST, LEAST_AMONG_FIVE = 2 / 3, 0.8


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The model, in FP32 on one thread."""
    options = EncoderOptions(
        folder=MODEL,
        model_id="photo-zh",
        revision="r",
        device="cpu",
        dtype="float32",
        batch_sizes=(1,),
        mean=SPEC.mean,
        std=SPEC.std,
        rescale=SPEC.rescale,
        threads=1,
    )
    return Encoder(options)


def top_words(encoder: Encoder, file: str, bank: LabelBank) -> list[str]:
    """The first five labels of everyday-zh for a photograph."""
    pixels, _ = decode((PHOTOS / file).read_bytes(), spec=SPEC, limits=LIMITS)
    labels = bank.encoded(bank.resolve("everyday-zh"))
    vectors = encoder.encode(pixels[None])
    probabilities, _ = score(vectors, labels.vectors, head="softmax", scale=encoder.scale, bias=encoder.bias)
    return [labels.label_set.words[index] for index in np.argsort(-probabilities[0])[:5]]


@pytest.mark.slow
def test_sample_photographs_get_their_words(encoder: Encoder) -> None:
    """At least two of three are right with the first label, and four of five among the first five."""
    bank = LabelBank(
        sets=load_label_sets([DATA / "label_sets"]),
        default="everyday-zh",
        encode_texts=encoder.encode_texts,
        label_tokens=encoder.label_tokens,
        max_cached=2,
        has_bias=encoder.bias is not None,
    )
    good = [sample for sample in SAMPLES if sample["error"] is None]
    found = {sample["file"]: top_words(encoder, sample["file"], bank) for sample in good}
    first = [sample["file"] for sample in good if found[sample["file"]][0] in sample["expected"]]
    among_five = [sample["file"] for sample in good if set(found[sample["file"]]) & set(sample["expected"])]
    told = f"{len(first)} first, {len(among_five)} among five, of {len(good)}: {found}"
    assert len(first) >= LEAST_FIRST * len(good), told
    assert len(among_five) >= LEAST_AMONG_FIVE * len(good), told


def test_labels_of_everyday_zh_are_all_known(encoder: Encoder) -> None:
    """Each is read whole, and no two get the same vector."""
    words = load_label_sets([DATA / "label_sets"])["everyday-zh"].words
    assert [len(tokens.ids) for tokens in encoder.label_tokens(words)] == [2] * len(words)
    vectors = encoder.encode_texts(words)
    near = vectors @ vectors.T - np.eye(len(words))
    assert near.max() < 0.999


def test_broken_sample_is_rejected() -> None:
    """As a broken picture."""
    (broken,) = [sample["file"] for sample in SAMPLES if sample["error"] == "picture_broken"]
    with pytest.raises(Rejected) as caught:
        decode((PHOTOS / broken).read_bytes(), spec=SPEC, limits=LIMITS)
    assert caught.value.code == ErrorCode.PICTURE_BROKEN
