"""The same weights, labels and picture give the same answer as transformers' own model and processor."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.service.labels import OWN_LABEL_SETS
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.stages.decode.resize import model_pixels
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.score.label_bank import LabelBank
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.scorer import score, top_tags
from tests.support import pictures
from tests.support.pictogram import PICTOGRAM_ZH

LIMITS = DecodeLimits(max_pixels=50_000_000, max_side=16_384, formats=("JPEG", "PNG", "WEBP", "GIF", "AVIF"))
FOLDER = PICTOGRAM_ZH
WORDS = ["动物", "人物", "交通工具", "食物", "建筑", "植物"]


@pytest.fixture(scope="module")
def spec() -> ImageSpec:
    """The embedded checkpoint's preprocessing."""
    return read_image_spec(FOLDER)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The script that shiwu replaces: AutoModel, AutoProcessor, FP32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModel.from_pretrained(
            FOLDER, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        ).eval()
        processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True, trust_remote_code=False)
    return model, processor


def make_encoder(spec: ImageSpec, dtype: str) -> Encoder:
    """The service's encoder over the same folder."""
    options = EncoderOptions(
        folder=FOLDER,
        model_id="m",
        revision="r",
        device="cpu",
        dtype=dtype,
        mean=spec.mean,
        std=spec.std,
        batch_sizes=(1, 4),
    )
    return Encoder(options)


def reference_scores(reference: Any, image: Image.Image) -> list[float]:
    """logits_per_image.softmax of one picture."""
    model, processor = reference
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        inputs = processor(images=image, text=WORDS, return_tensors="pt", padding=True)
        scores: list[float] = model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist()
    return scores


@pytest.mark.parametrize(
    ("dtype", "exact", "allowed"), [("float32", True, 1e-3), ("float32", False, 2e-2), ("bfloat16", True, 2e-2)]
)
def test_scores_equal_those_of_the_reference_script(
    spec: ImageSpec, reference: Any, dtype: str, exact: bool, allowed: float
) -> None:
    """Thirty pictures, six labels: same order on the exact path, and scores within the promised bound."""
    encoder = make_encoder(spec, dtype)
    sets = load_label_sets([OWN_LABEL_SETS])
    bank = LabelBank(
        sets=sets,
        default="six-zh",
        encode_texts=encoder.encode_texts,
        label_tokens=encoder.label_tokens,
        max_cached=2,
        has_bias=False,
    )
    for sample in pictures.samples():
        pixels, _ = decode(sample.data, spec=spec, limits=LIMITS, is_exact=exact)
        vectors = encoder.encode(pixels[None])
        probabilities, cosines = score(
            vectors, bank.encoded(bank.resolve(None)).vectors, head="softmax", scale=encoder.scale, bias=encoder.bias
        )
        [tags] = top_tags(probabilities, cosines, WORDS, top_k=[6], threshold=[0.0])
        with Image.open(io.BytesIO(sample.data)) as image:
            expected = dict(zip(WORDS, reference_scores(reference, image.convert("RGB")), strict=True))
        assert {tag.label: tag.score for tag in tags} == pytest.approx(expected, abs=allowed)
        if dtype == "float32" and exact:
            assert [tag.label for tag in tags] == sorted(expected, key=expected.__getitem__, reverse=True)


@pytest.mark.parametrize("size", [(333, 777), (777, 333), (64, 64), (65, 63), (10, 1000), (1, 1)])
def test_pixels_equal_those_of_the_processor(spec: ImageSpec, reference: Any, size: tuple[int, int]) -> None:
    """Pixels on the exact path are at most one level off transformers' processor, in every shape."""
    image = pictures.picture("熊猫").convert("RGB").resize(size)
    ours, _ = decode(pictures.png(image), spec=spec, limits=LIMITS, is_exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference[1].image_processor(images=image, return_tensors="np")["pixel_values"][0]
    mean, std = np.array(spec.mean).reshape(3, 1, 1), np.array(spec.std).reshape(3, 1, 1)
    levels = np.rint((theirs * std + mean) * 255)
    assert np.abs(ours.transpose(2, 0, 1).astype(int) - levels).max() <= 1


MOST_RESIZED = 2_000_000
"""Pixels of the largest image that transformers is made to resize here before it crops."""
UNDONE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""Orientation → Pillow's number of the transposition that stores an upright image so."""


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Width, height, shortest edge, crop width and height; with extreme aspect ratios, and crops beyond the edge."""
    edge = draw(st.integers(1, 48))
    short = draw(st.one_of(st.integers(1, 3), st.integers(1, 120)))
    longest = max(short, min(4000, MOST_RESIZED * short // edge**2))
    long = draw(st.one_of(st.integers(short, min(longest, short + 3)), st.integers(short, longest)))
    width, height = (short, long) if draw(st.booleans()) else (long, short)
    crop = st.integers(1, 56)
    return width, height, edge, draw(crop), draw(crop)


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(), resample=st.sampled_from([1, 2, 3, 4, 5]), orientation=st.integers(1, 8), seed=st.integers(0, 2**32)
)
def test_crop_equals_that_of_the_processor(
    shape: tuple[int, int, int, int, int], resample: int, orientation: int, seed: int
) -> None:
    """Crop before resize gives what resize before crop does, for noise of every shape and orientation.

    To the bit on the exact path, within a level where the shape is extreme, and within two on the fast path.
    """
    width, height, edge, crop_width, crop_height = shape
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    spec = ImageSpec(crop_width, crop_height, "crop", edge, resample, (0.5,) * 3, (0.5,) * 3)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": crop_height, "width": crop_width},
        resample=resample,
        do_rescale=False,
        do_normalize=False,
    )
    is_extreme = max(width, height) > 4 * min(width, height)
    for exact, levels in ((True, 1 if is_extreme else 0), (False, 2)):
        # A box filter jumps where its edge lies on a pixel's, so there the last digit of a float decides.
        if resample == Image.Resampling.BOX and (is_extreme or not exact):
            continue
        upright = Image.fromarray(noise)
        stored = upright.transpose(Image.Transpose(UNDONE[orientation])) if orientation > 1 else upright
        extent = (float(stored.width), float(stored.height))
        ours = model_pixels(stored, spec, extent=extent, orientation=orientation, size=upright.size, is_exact=exact)
        theirs = processor(images=upright, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= levels, "exact" if exact else "fast"


FATAL = """
from PIL import Image
from shiwu_worker.stages.decode.resize import resize_simd
for image, size, box in (
    ((3312, 1), (35, 7), (1653.4285714285713, 0.0, 1658.4285714285713, 1.0)),
    ((1, 3312), (7, 35), (0.0, 1653.4285714285713, 1.0, 1658.4285714285713)),
    ((913, 1), (45, 11), (454.45454545454544, 0.0, 458.54545454545456, 1.0)),
    ((2136, 3), (35, 7), (1060.2857142857142, 0.0, 1075.2857142857142, 3.0)),
):
    for is_rows_first in (False, True):
        resized = resize_simd(Image.new("RGB", image, "white"), size, box, 3, is_rows_first=is_rows_first)
        assert resized.getextrema() == ((255, 255),) * 3
"""


def test_boxes_that_crash_the_resizer_are_resized() -> None:
    """fast_image_resize 6.1 reads outside these images where it resizes both axes in one call."""
    subprocess.run([sys.executable, "-c", FATAL], timeout=60, check=True)


def test_score_does_not_depend_on_neighbours(spec: ImageSpec) -> None:
    """In one batch size, neighbours and positions change no bit; a permutation of the batch permutes the vectors."""
    encoder = make_encoder(spec, "float32")
    batch = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), np.uint8)
    vectors = encoder.encode(batch)
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(encoder.encode(batch[order]), vectors[order])
    np.testing.assert_array_equal(encoder.encode(batch[:3]), vectors[:3])


def test_wrong_shapes_are_rejected(spec: ImageSpec) -> None:
    """A batch that is no batch of this model's pictures is an error, not a guess."""
    encoder = make_encoder(spec, "float32")
    for shape in [(5, 64, 64, 3), (0, 64, 64, 3), (1, 32, 64, 3)]:
        with pytest.raises(ValueError, match="expected uint8"):
            encoder.encode(np.zeros(shape, np.uint8))
