"""The encoder: any dual encoder of transformers, fixed rungs, finite unit vectors in FP32."""

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
from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.errors import ExitCode, FatalError, NonFiniteError
from shiwu_worker.stages.encode import checkpoint as checkpoints
from shiwu_worker.stages.encode import cpu_pool as crew
from shiwu_worker.stages.encode import encoder as stage
from shiwu_worker.stages.encode.cpu_pool import CpuInferencePool, Spent
from shiwu_worker.stages.encode.device import choose_device, choose_dtypes
from shiwu_worker.stages.encode.encoder import Encoder
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


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Saving checkpoints shows bars and remarks that are of no use here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(params=["clip", "siglip", "altclip"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """Kind, model and folder of a tiny checkpoint."""
    model = make_model(request.param)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return request.param, model, tmp_path


def reference_logits(model: Any, pixels: NDArray[np.uint8], tokens: Any) -> NDArray[np.float32]:
    """What the model itself makes of pixels and tokens, in FP32."""
    values = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(pixel_values=values, **tokens).logits_per_image.numpy()
    return logits


def test_every_dual_encoder_gives_its_own_logits(checkpoint: tuple[str, Any, Path]) -> None:
    """Scale · cosine + bias are the model's logits_per_image; the head is sigmoid where there is a bias."""
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


def test_long_texts_are_cut_and_many_are_encoded_in_parts(
    checkpoint: tuple[str, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text over the limit is its beginning; a text's vector does not depend on the part it falls into."""
    _, _, folder = checkpoint
    encoder = make_encoder(folder)
    long = encoder.encode_texts(["a" * 50, "a" * (PLACES - 2)])
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)
    texts = ["abc", "猫", "a", "bc", "狗猫"]
    whole = encoder.encode_texts(texts)
    monkeypatch.setattr(checkpoints, "TEXTS_AT_ONCE", 2)
    np.testing.assert_allclose(encoder.encode_texts(texts), whole, atol=1e-6)


def test_only_siglip_gets_lower_case(checkpoint: tuple[str, Any, Path]) -> None:
    """SigLIP was trained in lower case and its tokenizer may not know; other tokenizers decide for themselves."""
    kind, _, folder = checkpoint
    upper, lower = make_encoder(folder).encode_texts(["ABC", "abc"])
    assert np.array_equal(upper, lower) == (kind == "siglip")


def test_a_batch_is_padded_to_its_rung() -> None:
    """Every count up to the largest rung gives as many vectors, and black padding changes no bit of them."""
    encoder = make_encoder(model_folder(None), rungs=(1, 4))
    pixels = noise(4, 64)
    full = encoder.encode(pixels)
    for count in (2, 3, 4):
        np.testing.assert_array_equal(encoder.encode(pixels[:count]), full[:count])
    assert encoder.encode(pixels[:1]).shape == (1, full.shape[1])
    np.testing.assert_allclose(encoder.encode(pixels[:1]), full[:1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_permutation_permutes_the_vectors(dtype: str) -> None:
    """No picture gets a neighbour's vector, and neighbours and places change not a bit, in any order."""
    encoder = make_encoder(model_folder(None), dtype=dtype, rungs=(8,))
    pixels = noise(8, 64)
    vectors = encoder.encode(pixels)
    assert len(np.unique(vectors, axis=0)) == 8
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(8)
        np.testing.assert_array_equal(encoder.encode(pixels[order]), vectors[order])


def test_earlier_batches_leave_nothing_behind() -> None:
    """The staging memory is reused: a small batch after a large one, and vectors kept from before, stay right."""
    encoder = make_encoder(model_folder(None), rungs=(4,))
    pixels = noise(4, 64)
    alone = encoder.encode(pixels[:1]).copy()
    kept = encoder.encode(pixels)
    copy = kept.copy()
    np.testing.assert_array_equal(encoder.encode(pixels[:1]), alone)
    np.testing.assert_array_equal(kept, copy)


def test_the_start_measures_two_sizes(tmp_path: Path) -> None:
    """The smallest and a larger one that is still quick, each twice; what the others cost is learned later."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), rungs=(1, 2, 4, 8), threads=1)
    seen: list[int] = []
    hook = encoder._model.vision_model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    encoder.warm(choose_largest=True)
    hook.remove()
    assert encoder.measured == (1, 8)
    assert seen == [1, 1, 8, 8]
    seconds = encoder.sizes.seconds()
    assert seconds.keys() == {1, 2, 4, 8}
    assert all(0 < took_s < 1 for took_s in seconds.values())


def test_a_thorough_start_measures_all_sizes(tmp_path: Path) -> None:
    """As `--tune` does."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), rungs=(1, 2, 4, 8))
    encoder.warm(choose_largest=True, is_thorough=True)
    assert encoder.measured == (1, 2, 4, 8)


def overflowing(folder: Path) -> Path:
    """A checkpoint that overflows on every picture but a black one."""
    model = make_model("clip")
    model.vision_model.embeddings.patch_embedding.weight.data.fill_(3e38)
    return saved(model, folder)


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """The error names exactly the pictures to blame; the others alone are encoded."""
    encoder = make_encoder(overflowing(tmp_path), mean=0.0, std=1.0)
    pixels = np.zeros((4, SIDE, SIDE, 3), np.uint8)
    pixels[[1, 3]] = 255
    with pytest.raises(NonFiniteError, match=r"rows \[1, 3\]") as caught:
        encoder.encode(pixels)
    assert caught.value.rows == (1, 3)
    assert np.isfinite(encoder.encode(pixels[[0, 2]])).all()


def test_a_model_that_overflows_does_not_warm_up(tmp_path: Path) -> None:
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
def test_wrong_pixels_are_refused(tmp_path: Path, pixels: NDArray[Any]) -> None:
    """The error says which shape was expected and which came."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path))
    with pytest.raises(ValueError, match=r"expected uint8 \(1 to 4, 16, 16, 3\), got"):
        encoder.encode(pixels)


def test_a_model_that_is_no_dual_encoder_is_refused(tmp_path: Path) -> None:
    """A text model loads in transformers, but can't tag pictures."""
    BertModel(BertConfig(**{**TEXT, "num_hidden_layers": 1})).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(WrongCheckpoint, match=r"expected a dual encoder.*got BertModel"):
        make_encoder(tmp_path)


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """Where weights are missing transformers makes random ones up, and answers would be noise."""
    model = make_model("clip")
    weights = model.state_dict()
    weights.pop("visual_projection.weight")
    model.save_pretrained(tmp_path, state_dict=weights)
    save_tokenizer(tmp_path)
    with pytest.raises(WrongCheckpoint, match=r"expected all weights of CLIPModel.*visual_projection"):
        make_encoder(tmp_path)


def test_loading_leaves_the_processs_settings_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    """None leaves torch's own choice."""
    folder, before = saved(make_model("clip"), tmp_path), torch.get_num_threads()
    make_encoder(folder)
    assert torch.get_num_threads() == before
    try:
        Encoder(folder=folder, model_id="m", revision="r", device="cpu", mean=(0.5,) * 3, std=(0.5,) * 3, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "build", "found", "text"),
    [
        ("cuda", None, 0, "is a build for CPUs; install one with CUDA"),
        ("cuda", "13.0", 0, "torch finds 0 with CUDA_VISIBLE_DEVICES=GPU-x"),
        ("cuda:2", "13.0", 2, "torch finds 2 with"),
    ],
)
def test_gpu_that_is_not_there_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, asked: str, build: str | None, found: int, text: str
) -> None:
    """With the setting, the reason and the exit code for models, after which a launcher tries again."""
    monkeypatch.setattr("torch.version.cuda", build)
    monkeypatch.setattr("torch.cuda.is_available", lambda: found > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x")
    with pytest.raises(FatalError, match=f"SHIWU_DEVICE: expected a GPU .*, got {asked}: .*{text}") as told:
        choose_device(asked)
    assert told.value.exit_code is ExitCode.MODEL
    if found:
        assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_what_auto_chooses() -> None:
    """FP16 on CUDA, never on a CPU; what is asked for by name is taken."""
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtypes("auto", torch.device("cpu")) in {(torch.float32,), (torch.bfloat16, torch.float32)}
    assert choose_dtypes("float16", torch.device("cpu")) == (torch.float16,)
    assert choose_dtypes("float32", torch.device("cuda")) == (torch.float32,)


def costing(encoder: Encoder, costs: Mapping[int, float]) -> None:
    """Let each pass of a size cost so much."""
    encoder._time = lambda rung: costs[rung]  # type: ignore[method-assign]  # a clock


def test_a_start_begins_with_the_size_beyond_which_nothing_is_gained(tmp_path: Path) -> None:
    """Larger ones are left for later; an operator's largest batch is begun with."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), rungs=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.1, 2: 0.12, 4: 0.238, 8: 0.48})
    encoder.warm(choose_largest=True, is_thorough=True)
    assert (encoder.rungs, encoder.sizes.largest) == ((1, 2, 4, 8), 2)
    assert encoder.sizes.slowest_s == pytest.approx(0.12)
    assert [encoder.sizes.take(waiting) for waiting in range(3)] == [0, 1, 2]
    assert encoder.encode(noise(8)).shape == (8, 8)
    costing(encoder, {1: 0.1, 2: 0.5, 4: 1.2, 8: 3.0})
    encoder.warm(is_thorough=True)
    assert encoder.sizes.largest == 8


def test_a_slow_model_is_measured_by_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two would take more than half a second; their cost is a guess, and no size begins above a second."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), rungs=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.4})
    monkeypatch.setattr(encoder, "_arrange_threads", lambda _: 0.4)
    encoder.warm(choose_largest=True)
    assert encoder.measured == (1,)
    assert encoder.sizes.largest == 2


def spend(encoder: Encoder, count: int, cost_s: float, **more: Any) -> None:
    """Run a batch of jobs for which the model takes so much CPU, as the scoring thread would."""
    flight = encoder.launch(noise(count))
    encoder.collect(flight)
    flight.spent = Spent(cost=cost_s, seconds=cost_s, **more)
    encoder.learn(flight)


def test_batches_of_jobs_teach_which_size_is_best(tmp_path: Path) -> None:
    """Where a wrong start said one image at a time; the first batch of a size, which pays for more, says nothing."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path), rungs=(1, 2, 4, 8), threads=1)
    costing(encoder, {1: 0.01, 2: 0.1, 4: 0.2, 8: 0.4})
    encoder.warm(choose_largest=True, is_thorough=True)
    encoder._run_before.clear()
    assert encoder.sizes.largest == 1
    first: dict[int, float] = {}
    for _ in range(200):
        count = encoder.sizes.take(8)
        spend(encoder, count, 0.009 + 0.001 * count if count in first else first.setdefault(count, 5.0))
    assert encoder.sizes.largest == 8


def test_threads_follow_the_cores_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who takes a core away from a container need not start it anew; images keep their vectors."""
    before = torch.get_num_threads()
    cores = [2]
    monkeypatch.setattr(stage, "usable_cores", lambda: cores[0])
    monkeypatch.setattr(model_threads, "QUICK_CORE_S", 0.0)
    try:
        torch.set_num_threads(2)
        encoder = make_encoder(saved(make_model("clip"), tmp_path))
        encoder.warm()
        assert encoder._threads is not None
        assert (encoder.threads, encoder._berths.parts_of(4)) == (2, 2)
        expected = encoder.encode(noise(4))
        for count, parts in ((1, 1), (2, 2)):
            cores[0] = count
            encoder._threads._looked_s -= POLL_INTERVAL_S
            np.testing.assert_allclose(encoder.encode(noise(4)), expected, atol=1e-5)
            assert (encoder.threads, encoder._berths.parts_of(4)) == (count, parts)
    finally:
        torch.set_num_threads(before)


def test_a_quick_model_leaves_a_core_to_the_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU of one image and not by the clock, which other programs lengthen; what is asked for is taken."""
    before = torch.get_num_threads()
    monkeypatch.setattr(stage, "usable_cores", lambda: 2)
    folder = saved(make_model("clip"), tmp_path)

    class Slow(CpuInferencePool):
        """Whose every batch is held up."""

        def start(self, *args: Any) -> Any:
            time.sleep(0.1)
            return super().start(*args)

    monkeypatch.setattr(stage, "CpuInferencePool", Slow)
    try:
        for asked, border_s, threads in ((None, 0.04, 1), (None, 0.0, 2), (2, 0.04, 2)):
            torch.set_num_threads(2)
            monkeypatch.setattr(model_threads, "QUICK_CORE_S", border_s)
            encoder = make_encoder(folder, rungs=(1, 2), threads=asked)
            encoder.warm()
            assert encoder.threads == threads
            assert encoder._berths.parts_of(2) == (2 if border_s == 0 else 1)
    finally:
        torch.set_num_threads(before)


def test_the_time_to_compile_is_not_the_time_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size compiles once, however long that takes, and only its later passes count; two in vain end the search."""
    clock, compiled, towers = SimpleNamespace(now_s=0.0), list[int](), list[Tower]()

    def slow_to_compile(eager: Tower) -> Tower:
        towers.append(eager)

        def run(raw: torch.Tensor) -> torch.Tensor:
            size = len(raw)
            clock.now_s += {1: 0.1, 2: 0.12, 4: 0.235, 8: 0.47, 16: 0.94}[size] if size in compiled else 20
            compiled.extend([size] if size not in compiled else [])
            return eager(raw)

        return run

    monkeypatch.setattr(stage, "compiled_tower", slow_to_compile)
    monkeypatch.setattr(crew, "time", SimpleNamespace(monotonic=lambda: clock.now_s, thread_time=lambda: clock.now_s))
    folder = saved(make_model("clip"), tmp_path)
    encoder = make_encoder(folder, rungs=(1, 2, 4, 8, 16), is_compiled=True, threads=1)
    encoder.warm(choose_largest=True)
    assert encoder.rungs == encoder.measured == (1, 2, 4, 8)
    assert encoder.sizes.largest == 2
    # By one thread: the clock is its CPU, too.
    assert encoder.sizes.seconds() == pytest.approx({1: 0.1, 2: 0.12, 4: 0.235, 8: 0.47})
    assert compiled == [1, 2, 4, 8]
    assert len(towers) == 1


def test_a_dtype_that_says_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is further from FP32 than a cosine of 0.999, the next format stands in, with unrounded weights."""
    folder = saved(make_model("clip"), tmp_path)
    monkeypatch.setattr(stage, "choose_dtypes", lambda *_: (torch.bfloat16, torch.float32))
    assert make_encoder(folder, dtype="auto").info.dtype == "bfloat16"
    monkeypatch.setattr(stage, "MIN_COSINE", 1.01)
    encoder = make_encoder(folder, dtype="auto")
    assert encoder.info.dtype == "float32"
    np.testing.assert_array_equal(encoder.encode(noise(2)), make_encoder(folder, dtype="float32").encode(noise(2)))


def test_batches_may_be_launched_ahead(tmp_path: Path) -> None:
    """Two batches on their way at a time do not touch each other's vectors; rows are gathered in any order."""
    encoder = make_encoder(saved(make_model("clip"), tmp_path))
    pixels = noise(6)
    expected = np.concatenate([encoder.encode(pixels[i : i + 1]) for i in range(6)])
    first, second = encoder.launch(pixels, [4, 0]), encoder.launch(pixels, [5])
    second.wait()
    np.testing.assert_allclose(encoder.collect(second), expected[[5]], atol=1e-5)
    np.testing.assert_allclose(encoder.collect(first), expected[[4, 0]], atol=1e-5)
    with pytest.raises(RuntimeError, match="one collect"):
        first.collect()


def test_a_batch_that_is_divided_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is not quick; a picture gets the same vector wherever in a batch of a size it lies."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole, divided = (make_encoder(model_folder(None), rungs=(1, 2, 4)) for _ in range(2))
        monkeypatch.setattr(model_threads, "QUICK_CORE_S", math.inf)
        whole.warm()
        monkeypatch.setattr(model_threads, "QUICK_CORE_S", 0.0)
        divided.warm()
        assert torch.get_num_threads() == 2, "expected a model that is not quick to keep all cores"
        crews = [one._cpu_pool for one in (whole, divided)]
        assert [crew is not None and crew.parts_of(4) for crew in crews] == [1, 2]
        pixels = noise(4, 64)
        vectors = divided.encode(pixels)
        np.testing.assert_allclose(vectors, whole.encode(pixels), atol=1e-5)
        np.testing.assert_array_equal(vectors[[2, 3, 0, 1]], divided.encode(pixels[[2, 3, 0, 1]]))
        np.testing.assert_array_equal(vectors[::-1], divided.encode(pixels[::-1].copy()))
    finally:
        torch.set_num_threads(before)


def test_no_more_threads_than_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container sees all cores of its node; what is asked for by name is taken as it is."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(stage, "usable_cores", lambda: 1)
        make_encoder(model_folder(None))
        assert torch.get_num_threads() == 1
        make_encoder(model_folder(None), threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_takes_all_cores_is_one_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers, texts, whole batches and FP32: more than one team of OpenMP's would make all of them slow."""
    before = torch.get_num_threads()
    # On a busy machine an image of the tiny model may take so much CPU that its batches would be divided.
    monkeypatch.setattr(model_threads, "QUICK_CORE_S", math.inf)
    seen: dict[str, set[str]] = {}

    def noted(what: str, work: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            seen.setdefault(what, set()).add(threading.current_thread().name)
            return work(*args, **named)

        return run

    monkeypatch.setattr(stage, "load_model", noted("weights", stage.load_model))
    monkeypatch.setattr(stage, "StagingRing", noted("buffers", stage.StagingRing))
    monkeypatch.setattr(stage, "eager_tower", lambda *args, **named: noted("tower", eager_tower(*args, **named)))
    try:
        encoder = make_encoder(saved(make_model("clip"), tmp_path), dtype="bfloat16", threads=2)
        encoder.warm()
        monkeypatch.setattr(encoder._texts, "encode", noted("texts", encoder._texts.encode))
        encoder.encode_texts(["a"])
        encoder.encode_exact(noise(1))
        encoder.encode(noise(1))
    finally:
        torch.set_num_threads(before)
    assert seen == {what: {"captain-0"} for what in ("weights", "buffers", "tower", "texts")}


@pytest.mark.parametrize(("is_compiled", "parts"), [(False, 2), (True, 1)])
def test_a_compiled_tower_is_not_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_compiled: bool, parts: int
) -> None:
    """Its number of threads is built in."""
    before = torch.get_num_threads()
    monkeypatch.setattr(model_threads, "QUICK_CORE_S", 0.0)
    monkeypatch.setattr(stage, "compiled_tower", lambda eager: eager)
    try:
        encoder = make_encoder(saved(make_model("clip"), tmp_path), threads=2, is_compiled=is_compiled)
        encoder.warm()
        assert encoder._cpu_pool is not None
        assert encoder._cpu_pool.parts_of(4) == parts
    finally:
        torch.set_num_threads(before)
