"""The encoder: any dual encoder of transformers, fixed batch_sizes, finite unit vectors in FP32."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint
from shiwu_worker.errors import NonFiniteError
from shiwu_worker.stages.encode import checkpoint as checkpoint_module
from shiwu_worker.stages.encode import cpu_pool, model
from shiwu_worker.stages.encode import encoder as encoder_module
from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool, Spent
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.encode.towers import Tower, eager_tower
from shiwu_worker.stages.encode.tuning import thread_policy as model_threads
from shiwu_worker.stages.encode.tuning.thread_policy import POLL_INTERVAL_S
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


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Switches off the progress bars and messages that transformers shows when it saves checkpoints."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity(verbosity)


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


def test_quick_start_times_two_batch_sizes(tmp_path: Path) -> None:
    """The smallest and a larger one that is still quick, each twice; the cost of the others is learned later."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    seen: list[int] = []
    hook = encoder._model.module.vision_model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    encoder.warm(choose_largest=True)
    hook.remove()
    assert encoder.timed_sizes == (1, 8)
    assert seen == [1, 1, 8, 8]
    seconds = encoder.size_policy.seconds()
    assert seconds.keys() == {1, 2, 4, 8}
    assert all(0 < took_s < 1 for took_s in seconds.values())


def test_thorough_start_times_all_batch_sizes(tmp_path: Path) -> None:
    """`--tune` starts this way."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8))
    encoder.warm(choose_largest=True, is_thorough=True)
    assert encoder.timed_sizes == (1, 2, 4, 8)


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


def test_threads_are_set_only_when_given(tmp_path: Path) -> None:
    """None keeps torch's own choice."""
    folder, before = saved(make_model("clip"), tmp_path), torch.get_num_threads()
    make_encoder(folder)
    assert torch.get_num_threads() == before
    try:
        Encoder(
            EncoderOptions(
                folder=folder,
                model_id="m",
                revision="r",
                device="cpu",
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
                threads=1,
            )
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def costing(encoder: Encoder, costs: Mapping[int, float]) -> None:
    """Set the cost of each pass of a size."""
    encoder._time_pass = lambda size: costs[size]  # type: ignore[method-assign]  # injected times


def test_start_begins_with_the_largest_useful_size(tmp_path: Path) -> None:
    """Larger sizes are tried later. The start begins with the largest batch that the operator set."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.1, 2: 0.12, 4: 0.238, 8: 0.48})
    encoder.warm(choose_largest=True, is_thorough=True)
    assert (encoder.batch_sizes, encoder.size_policy.largest) == ((1, 2, 4, 8), 2)
    assert encoder.size_policy.slowest_s == pytest.approx(0.12)
    assert [encoder.size_policy.take(waiting) for waiting in range(3)] == [0, 1, 2]
    assert encoder.encode(noise(8)).shape == (8, 8)
    costing(encoder, {1: 0.1, 2: 0.5, 4: 1.2, 8: 3.0})
    encoder.warm(is_thorough=True)
    assert encoder.size_policy.largest == 8


def test_slow_model_is_timed_with_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images would take more than half a second: their cost is estimated, and no size above a second is chosen."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.4})
    monkeypatch.setattr(encoder, "_choose_threads", lambda _: 0.4)
    encoder.warm(choose_largest=True)
    assert encoder.timed_sizes == (1,)
    assert encoder.size_policy.largest == 2


def spend(encoder: Encoder, count: int, cost_s: float, **more: Any) -> None:
    """Run a batch of jobs for which the model takes `cost_s` CPU seconds, as the score thread does."""
    batch = encoder.launch(noise(count))
    encoder.collect(batch)
    batch.spent = Spent(cost=cost_s, seconds=cost_s, **more)
    encoder.learn(batch)


def test_best_size_is_learned_from_batches_of_jobs(tmp_path: Path) -> None:
    """A wrong start is corrected; the first batch of a size, which also pays for warming up, is ignored."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), batch_sizes=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.01, 2: 0.1, 4: 0.2, 8: 0.4})
    encoder.warm(choose_largest=True, is_thorough=True)
    encoder._warmed_sizes.clear()
    assert encoder.size_policy.largest == 1
    first: dict[int, float] = {}
    for _ in range(200):
        count = encoder.size_policy.take(8)
        spend(encoder, count, 0.009 + 0.001 * count if count in first else first.setdefault(count, 5.0))
    assert encoder.size_policy.largest == 8


def test_threads_follow_the_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator can take a core away from a running container; images keep their vectors."""
    before = torch.get_num_threads()
    cores = [2]
    monkeypatch.setattr(encoder_module, "usable_cores", lambda: cores[0])
    monkeypatch.setattr(model_threads, "FAST_MODEL_CORE_S", 0.0)
    try:
        torch.set_num_threads(2)
        encoder = make_encoder(saved(make_model("clip"), tmp_path))
        encoder.warm()
        assert encoder._thread_policy is not None
        assert (encoder.threads, encoder._staging.split_count(4)) == (2, 2)
        expected = encoder.encode(noise(4))
        for count, parts in ((1, 1), (2, 2)):
            cores[0] = count
            encoder._thread_policy._updated_s -= POLL_INTERVAL_S
            np.testing.assert_allclose(encoder.encode(noise(4)), expected, atol=1e-5)
            assert (encoder.threads, encoder._staging.split_count(4)) == (count, parts)
    finally:
        torch.set_num_threads(before)


def test_fast_model_leaves_a_core_to_the_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU time of one image decides, not elapsed time; the number that was asked for is used."""
    before = torch.get_num_threads()
    monkeypatch.setattr(encoder_module, "usable_cores", lambda: 2)
    folder = saved(make_model("clip"), tmp_path)

    class SlowPool(CpuInferencePool):
        """A pool whose every batch is delayed."""

        def submit(self, *args: Any) -> Any:
            time.sleep(0.1)
            return super().submit(*args)

    monkeypatch.setattr(encoder_module, "CpuInferencePool", SlowPool)
    try:
        for asked, border_s, threads in ((None, 0.04, 1), (None, 0.0, 2), (2, 0.04, 2)):
            torch.set_num_threads(2)
            monkeypatch.setattr(model_threads, "FAST_MODEL_CORE_S", border_s)
            encoder = make_encoder(folder, batch_sizes=(1, 2), threads=asked)
            encoder.warm()
            assert encoder.threads == threads
            assert encoder._staging.split_count(2) == (2 if border_s == 0 else 1)
    finally:
        torch.set_num_threads(before)


def test_compile_time_is_not_counted_as_pass_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size compiles once, and only its later passes count. Two sizes without a gain end the search."""
    clock, compiled, towers = SimpleNamespace(now_s=0.0), list[int](), list[Tower]()

    def slow_to_compile(eager: Tower) -> Tower:
        towers.append(eager)

        def run(raw: torch.Tensor) -> torch.Tensor:
            size = len(raw)
            clock.now_s += {1: 0.1, 2: 0.12, 4: 0.235, 8: 0.47, 16: 0.94}[size] if size in compiled else 20
            compiled.extend([size] if size not in compiled else [])
            return eager(raw)

        return run

    monkeypatch.setattr(encoder_module, "compiled_tower", slow_to_compile)
    monkeypatch.setattr(
        cpu_pool, "time", SimpleNamespace(monotonic=lambda: clock.now_s, thread_time=lambda: clock.now_s)
    )
    folder = saved(make_model("clip"), tmp_path)
    encoder = make_encoder(folder, batch_sizes=(1, 2, 4, 8, 16), is_compiled=True, threads=1)
    encoder.warm(choose_largest=True)
    assert encoder.batch_sizes == encoder.timed_sizes == (1, 2, 4, 8)
    assert encoder.size_policy.largest == 2
    # On one thread elapsed time is also its CPU time.
    assert encoder.size_policy.seconds() == pytest.approx({1: 0.1, 2: 0.12, 4: 0.235, 8: 0.47})
    assert compiled == [1, 2, 4, 8]
    assert len(towers) == 1


def test_dtype_that_disagrees_with_fp32_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If bfloat16 has a cosine below 0.999 to FP32, the next format is used, with unrounded weights."""
    folder = saved(make_model("clip"), tmp_path)
    unrounded = make_encoder(folder, dtype="float32").encode(noise(2))
    monkeypatch.setattr(model, "choose_dtypes", lambda *_: (torch.bfloat16, torch.float32))
    assert make_encoder(folder, dtype="auto").info.dtype == "bfloat16"
    monkeypatch.setattr(model, "MIN_COSINE", 1.01)
    encoder = make_encoder(folder, dtype="auto")
    assert encoder.info.dtype == "float32"
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


def test_split_batch_gives_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of one size, an image gets the same vector at every position. The model is not fast."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole, split = (make_encoder(PICTOGRAM_ZH, batch_sizes=(1, 2, 4)) for _ in range(2))
        monkeypatch.setattr(model_threads, "FAST_MODEL_CORE_S", math.inf)
        whole.warm()
        monkeypatch.setattr(model_threads, "FAST_MODEL_CORE_S", 0.0)
        split.warm()
        assert torch.get_num_threads() == 2, "expected a model that is not fast to keep all cores"
        pools = [encoder._cpu_pool for encoder in (whole, split)]
        assert [pool is not None and pool.split_count(4) for pool in pools] == [1, 2]
        pixels = noise(4, 64)
        vectors = split.encode(pixels)
        np.testing.assert_allclose(vectors, whole.encode(pixels), atol=1e-5)
        np.testing.assert_array_equal(vectors[[2, 3, 0, 1]], split.encode(pixels[[2, 3, 0, 1]]))
        np.testing.assert_array_equal(vectors[::-1], split.encode(pixels[::-1].copy()))
    finally:
        torch.set_num_threads(before)


def test_threads_do_not_exceed_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container sees all cores of its node; a number that was asked for is used as it is."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(encoder_module, "usable_cores", lambda: 1)
        make_encoder(PICTOGRAM_ZH)
        assert torch.get_num_threads() == 1
        make_encoder(PICTOGRAM_ZH, threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_work_on_all_cores_runs_on_the_exclusive_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers, texts, whole batches and FP32; a second OpenMP team would slow all of them."""
    before = torch.get_num_threads()
    # On a busy machine an image of the tiny model may take so much CPU that its batches would be split.
    monkeypatch.setattr(model_threads, "FAST_MODEL_CORE_S", math.inf)
    seen: dict[str, set[str]] = {}

    def noted(what: str, work: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            seen.setdefault(what, set()).add(threading.current_thread().name)
            return work(*args, **named)

        return run

    monkeypatch.setattr(model, "load_model", noted("weights", model.load_model))
    monkeypatch.setattr(encoder_module, "StagingRing", noted("buffers", encoder_module.StagingRing))
    monkeypatch.setattr(model, "eager_tower", lambda *args, **named: noted("tower", eager_tower(*args, **named)))
    try:
        encoder = make_encoder(saved(make_model("clip"), tmp_path), dtype="bfloat16", threads=2)
        encoder.warm()
        monkeypatch.setattr(encoder._texts, "encode", noted("texts", encoder._texts.encode))
        encoder.encode_texts(["a"])
        encoder.encode_exact(noise(1))
        encoder.encode(noise(1))
    finally:
        torch.set_num_threads(before)
    assert seen == {what: {"encode-exclusive"} for what in ("weights", "buffers", "tower", "texts")}


@pytest.mark.parametrize(("is_compiled", "parts"), [(False, 2), (True, 1)])
def test_compiled_tower_is_not_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool, parts: int
) -> None:
    """A compiled tower has a fixed number of threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(model_threads, "FAST_MODEL_CORE_S", 0.0)
    monkeypatch.setattr(encoder_module, "compiled_tower", lambda eager: eager)
    try:
        encoder = make_encoder(saved(make_model("clip"), tmp_path), threads=2, is_compiled=is_compiled)
        encoder.warm()
        assert encoder._cpu_pool is not None
        assert encoder._cpu_pool.split_count(4) == parts
    finally:
        torch.set_num_threads(before)
