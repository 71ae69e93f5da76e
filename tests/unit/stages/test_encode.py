"""The encoder: any dual encoder of transformers, fixed batch_sizes, finite unit vectors in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from structlog.testing import capture_logs
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint
from shiwu_worker.errors import NonFiniteError
from shiwu_worker.stages.encode import checkpoint as checkpoint_module
from shiwu_worker.stages.encode import model
from shiwu_worker.stages.score.scorer import score
from tests.support.encoders import (
    BIAS,
    PLACES,
    SCALE,
    SIDE,
    TEXT,
    make_encoder,
    make_model,
    noise,
    save_tokenizer,
    saved,
)
from tests.support.pictogram import PICTOGRAM_ZH

pytestmark = pytest.mark.usefixtures("silent_transformers")


@pytest.fixture(params=["clip", "siglip", "altclip", "metaclip_2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """Kind, model and folder of a tiny checkpoint."""
    model = make_model(request.param)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return request.param, model, tmp_path


def reference_logits(model: Any, pixels: NDArray[np.uint8], tokens: Any) -> NDArray[np.float32]:
    """The logits that the model itself computes, in FP32."""
    values = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(pixel_values=values, **tokens).logits_per_image.numpy()
    return logits


def test_dual_encoder_gives_the_logits_of_its_model(checkpoint: tuple[str, Any, Path]) -> None:
    """Scale · cosine + bias are the model's logits_per_image; the head is sigmoid if there is a bias."""
    kind, model, folder = checkpoint
    encoder = make_encoder(folder)
    texts = ["abc", "猫", "d"]
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)(
        texts,
        padding="max_length" if kind == "siglip" else True,
        max_length=PLACES,
        truncation=True,
        return_tensors="pt",
    )
    pixels, words = noise(3), encoder.encode_texts(texts)
    expected = reference_logits(model, pixels, tokens)
    vectors = encoder.encode(pixels)
    assert vectors.dtype == words.dtype == np.float32
    assert np.linalg.norm(np.concatenate([vectors, words]), axis=1) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(encoder.scale * vectors @ words.T + (encoder.bias or 0), expected, atol=1e-3)
    assert encoder.default_head == ("sigmoid" if kind == "siglip" else "softmax")
    probabilities, _ = score(vectors, words, head=encoder.default_head, scale=encoder.scale, bias=encoder.bias)
    logits = torch.from_numpy(expected)
    head = logits.sigmoid() if kind == "siglip" else logits.softmax(dim=-1)
    np.testing.assert_allclose(probabilities, head.numpy(), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale_and_bias_are_not_rounded_to_the_dtype(tmp_path: Path, dtype: str) -> None:
    """A scale of 100 stays 100 in bfloat16, where its logarithm would give 98.9."""
    encoder = make_encoder(saved(make_model("siglip"), tmp_path), dtype=dtype)
    assert encoder.scale == pytest.approx(SCALE, rel=1e-5)
    assert encoder.bias == pytest.approx(BIAS, rel=1e-5)
    assert encoder.info.dtype == dtype


def test_long_texts_are_cut_and_many_are_batched(
    checkpoint: tuple[str, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text over the limit is its beginning; a text's vector does not depend on the part it falls into."""
    _, _, folder = checkpoint
    encoder = make_encoder(folder)
    long = encoder.encode_texts(["a" * 50, "a" * (PLACES - 2)])
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)
    texts = ["abc", "猫", "a", "bc", "狗猫"]
    whole = encoder.encode_texts(texts)
    monkeypatch.setattr(checkpoint_module, "MAX_TEXTS_PER_BATCH", 2)
    np.testing.assert_allclose(encoder.encode_texts(texts), whole, atol=1e-6)


def test_only_siglip_gets_lower_case(checkpoint: tuple[str, Any, Path]) -> None:
    """SigLIP was trained with lower case, which its tokenizer may not apply; other tokenizers decide themselves."""
    kind, _, folder = checkpoint
    upper, lower = make_encoder(folder).encode_texts(["ABC", "abc"])
    assert np.array_equal(upper, lower) == (kind == "siglip")


def test_batch_is_padded_to_an_allowed_size() -> None:
    """Every count up to the largest size gives as many vectors, and black padding changes no bit of them."""
    encoder = make_encoder(PICTOGRAM_ZH, batch_sizes=(1, 4))
    pixels = noise(4, 64)
    full = encoder.encode(pixels)
    for count in (2, 3, 4):
        np.testing.assert_array_equal(encoder.encode(pixels[:count]), full[:count])
    assert encoder.encode(pixels[:1]).shape == (1, full.shape[1])
    np.testing.assert_allclose(encoder.encode(pixels[:1]), full[:1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_permuted_batch_gives_permuted_vectors(dtype: str) -> None:
    """No image gets a neighbour's vector, and neighbours and positions change no bit, in any order."""
    encoder = make_encoder(PICTOGRAM_ZH, dtype=dtype, batch_sizes=(8,))
    pixels = noise(8, 64)
    vectors = encoder.encode(pixels)
    assert len(np.unique(vectors, axis=0)) == 8
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(8)
        np.testing.assert_array_equal(encoder.encode(pixels[order]), vectors[order])


def test_earlier_batch_does_not_change_a_later_one() -> None:
    """Staging buffers are reused: a small batch after a large one, and vectors kept from before, stay correct."""
    encoder = make_encoder(PICTOGRAM_ZH, batch_sizes=(4,))
    pixels = noise(4, 64)
    alone = encoder.encode(pixels[:1]).copy()
    kept = encoder.encode(pixels)
    copy = kept.copy()
    np.testing.assert_array_equal(encoder.encode(pixels[:1]), alone)
    np.testing.assert_array_equal(kept, copy)


def overflowing(folder: Path) -> Path:
    """A checkpoint that overflows on every image except a black one."""
    model = make_model("clip")
    model.vision_model.embeddings.patch_embedding.weight.data.fill_(3e38)
    return saved(model, folder)


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """The error names exactly the rows of these images; the others alone are encoded."""
    encoder = make_encoder(overflowing(tmp_path), mean=0.0, std=1.0)
    pixels = np.zeros((4, SIDE, SIDE, 3), np.uint8)
    pixels[[1, 3]] = 255
    with pytest.raises(NonFiniteError, match=r"rows \[1, 3\]") as caught:
        encoder.encode(pixels)
    assert caught.value.rows == (1, 3)
    assert np.isfinite(encoder.encode(pixels[[0, 2]])).all()


def test_overflowing_model_does_not_warm_up(tmp_path: Path) -> None:
    """A worker with such weights never becomes ready."""
    with pytest.raises(NonFiniteError):
        make_encoder(overflowing(tmp_path), mean=0.0, std=1.0).warm()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((0, SIDE, SIDE, 3), np.uint8),
        np.zeros((5, SIDE, SIDE, 3), np.uint8),
        np.zeros((1, 8, SIDE, 3), np.uint8),
        np.zeros((1, 3, SIDE, SIDE), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.uint8),
        np.zeros((1, SIDE, SIDE, 3), np.float32),
    ],
    ids=["none", "too many", "size", "channels first", "no batch", "float"],
)
def test_wrong_pixels_are_rejected(tmp_path: Path, pixels: NDArray[Any]) -> None:
    """The error says which shape was expected and which came."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path))
    with pytest.raises(ValueError, match=r"expected uint8 \(1 to 4, 16, 16, 3\), got"):
        encoder.encode(pixels)


def test_model_that_is_no_dual_encoder_is_rejected(tmp_path: Path) -> None:
    """A text model loads in transformers, but cannot tag images."""
    BertModel(BertConfig(**{**TEXT, "num_hidden_layers": 1})).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(WrongCheckpoint, match=r"expected a dual encoder.*got BertModel"):
        make_encoder(tmp_path)


def test_checkpoint_with_missing_weights_is_rejected(tmp_path: Path) -> None:
    """transformers would fill missing weights at random, and answers would be noise."""
    model = make_model("clip")
    weights = model.state_dict()
    weights.pop("visual_projection.weight")
    model.save_pretrained(tmp_path, state_dict=weights)
    save_tokenizer(tmp_path)
    with pytest.raises(WrongCheckpoint, match=r"expected all weights of CLIPModel.*visual_projection"):
        make_encoder(tmp_path)


def test_loading_keeps_the_settings_of_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading prints nothing, and progress bars and verbosity of transformers are as before."""
    folder = saved(make_model("siglip"), tmp_path)
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity_warning()
    capfd.readouterr()
    make_encoder(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == transformers_logging.WARNING


def test_dtype_that_disagrees_with_fp32_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If bfloat16 has a cosine below 0.999 to FP32, the next format is used, with unrounded weights."""
    folder = saved(make_model("clip"), tmp_path)
    unrounded = make_encoder(folder, dtype="float32").encode(noise(2))
    monkeypatch.setattr(model, "choose_dtypes", lambda *_: (torch.bfloat16, torch.float32))
    assert make_encoder(folder, dtype="auto").info.dtype == "bfloat16"
    monkeypatch.setattr(model, "MIN_COSINE", 1.01)
    with capture_logs() as logs:
        encoder = make_encoder(folder, dtype="auto")
    assert encoder.info.dtype == "float32"
    [refused] = [line for line in logs if line["event"] == "dtype_refused"]
    assert (refused["log_level"], refused["dtype"], refused["expected"]) == ("info", "torch.bfloat16", 1.01)
    assert 0.99 < refused["cosine"] == round(refused["cosine"], 4)
    assert refused["meaning"].endswith("trying the next one")
    np.testing.assert_array_equal(encoder.encode(noise(2)), unrounded)


def test_two_batches_in_flight_do_not_mix(tmp_path: Path) -> None:
    """Two batches at a time do not touch each other's vectors; rows are gathered in any order."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path))
    pixels = noise(6)
    expected = np.concatenate([encoder.encode(pixels[i : i + 1]) for i in range(6)])
    first, second = encoder.launch(pixels, [4, 0]), encoder.launch(pixels, [5])
    second.wait()
    np.testing.assert_allclose(encoder.collect(second), expected[[5]], atol=1e-5)
    np.testing.assert_allclose(encoder.collect(first), expected[[4, 0]], atol=1e-5)
    with pytest.raises(RuntimeError, match="one collect"):
        first.collect()
