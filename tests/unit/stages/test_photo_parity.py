"""On the sample photographs, the worker with photo-zh answers as transformers' own model and processor do.

The reference script is AutoModel and AutoProcessor, and a softmax over the labels of everyday-zh. It opens an image as
`Image.open(...).convert("RGB")` does. An image that is stored turned, or has an alpha channel, is turned upright and
laid on white for it first, because the worker does so on purpose and the script does not.
"""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

import shiwu_worker
from shiwu.contract import Tag
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.stages.decode.resize import model_pixels
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.scorer import score, top_tags

pytestmark = pytest.mark.xdist_group(__name__)  # so that the reference runs once

DATA = Path(shiwu_worker.__file__).parent / "data"
MODEL = DATA / "photo_zh"
PHOTOS = Path(__file__).resolve().parents[3] / "demo" / "photos"
GOOD: list[str] = [
    sample["file"]
    for sample in json.loads((PHOTOS / "samples.json").read_text(encoding="utf-8"))
    if sample["error"] is None
]
SPEC = read_image_spec(MODEL)
LABELS = load_label_sets([DATA / "label_sets"])["everyday-zh"]
LIMITS = DecodeLimits(max_pixels=50_000_000, max_side=10_000, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF"))
TOP_K = 5
NEAR_TIE = 0.02
"""Two scores of the reference that lie as near as this may change places on the fast path."""

Answers = dict[str, NDArray[np.float64]]
"""File → the score of each label."""


@pytest.fixture(scope="module")
def reference() -> Answers:
    """The scores that the reference script gives in FP32."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model: Any = AutoModel.from_pretrained(
            MODEL, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
        processor: Any = AutoProcessor.from_pretrained(MODEL, local_files_only=True, trust_remote_code=False)
        images = [_shown(PHOTOS / file) for file in GOOD]
        inputs = processor(text=list(LABELS.words), images=images, return_tensors="pt", padding=True)
        scores = model(**inputs).logits_per_image.softmax(dim=-1).double().numpy()
    return dict(zip(GOOD, scores, strict=True))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The worker's encoder over the same folder, in FP32."""
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
    )
    return Encoder(options)


def _shown(path: Path) -> Image.Image:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        upright = ImageOps.exif_transpose(image)
    if "A" in upright.getbands():
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def worker_answers(encoder: Encoder, *, exact: bool) -> dict[str, tuple[NDArray[np.float32], tuple[Tag, ...]]]:
    """The score of each label, and the first tags, of each photograph by the worker's own parts."""
    bank = LabelBank(
        sets={"everyday-zh": LABELS},
        default="everyday-zh",
        encode_texts=encoder.encode_texts,
        label_tokens=encoder.label_tokens,
        max_cached=1,
        has_bias=encoder.bias is not None,
    )
    labels = bank.encoded(bank.resolve(None)).vectors
    answers = {}
    for file in GOOD:
        pixels, _ = decode((PHOTOS / file).read_bytes(), spec=SPEC, limits=LIMITS, is_exact=exact)
        vectors = encoder.encode(pixels[None])
        scores, cosines = score(vectors, labels, head="softmax", scale=encoder.scale, bias=encoder.bias)
        [tags] = top_tags(scores, cosines, LABELS.words, top_k=[TOP_K], threshold=[0.0])
        answers[file] = scores[0], tags
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "allowed"), [(True, 1e-3), (False, 2e-2)])
def test_photographs_get_the_answers_of_the_reference_script(
    reference: Answers, encoder: Encoder, exact: bool, allowed: float
) -> None:
    """All 256 scores are within the bound, and the first label is the reference's.

    On the fast path two labels may change places if the reference's scores for them differ by `NEAR_TIE` at most.
    """
    found = worker_answers(encoder, exact=exact)
    off = {file: float(np.abs(found[file][0] - reference[file]).max()) for file in GOOD}
    assert max(off.values()) <= allowed, sorted(off.items(), key=lambda item: -item[1])[:5]
    near_tie = 0.0 if exact else NEAR_TIE
    for file in GOOD:
        scores, tags = reference[file], found[file][1]
        assert len(tags) == TOP_K
        by_label = dict(zip(LABELS.words, scores.tolist(), strict=True))
        best = sorted(by_label.values(), reverse=True)
        for tag, expected in zip(tags, best, strict=False):
            assert by_label[tag.label] >= expected - near_tie, (file, tags, best[:TOP_K])


@pytest.mark.parametrize(
    "spec", [SPEC, dataclasses.replace(SPEC, resize="squash", shortest_edge=None)], ids=["crop", "squash"]
)
@pytest.mark.parametrize("file", ["brook.jpg", "two-dogs.jpg", "astronaut.jpg"], ids=["wide", "high", "square"])
def test_fast_resize_is_within_a_level(file: str, spec: ImageSpec) -> None:
    """Of Pillow's, in either preprocessing, for an image that is decoded at full size."""
    image = _shown(PHOTOS / file)
    extent = (float(image.width), float(image.height))
    fast, exact = (
        model_pixels(image, spec, extent=extent, orientation=1, size=image.size, is_exact=exact)
        for exact in (False, True)
    )
    off = np.abs(fast.astype(int) - exact.astype(int))
    assert off.max() <= 1
    assert off.mean() <= 0.01


@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_resize_keeps_the_order_of_the_processor(orientation: int) -> None:
    """Where Pillow resizes the height first, and where such an image is stored sideways."""
    upright = _shown(PHOTOS / "two-dogs.jpg").resize((300, 1800))
    spec = dataclasses.replace(SPEC, resize="squash", shortest_edge=None)
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90)
    extent = (float(stored.width), float(stored.height))
    fast, exact = (
        model_pixels(stored, spec, extent=extent, orientation=orientation, size=upright.size, is_exact=exact)
        for exact in (False, True)
    )
    assert np.abs(fast.astype(int) - exact.astype(int)).max() <= 1
