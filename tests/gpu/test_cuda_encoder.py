"""Graphs, pinned staging buffers and batches launched ahead give what plain eager passes give."""

from __future__ import annotations

import random

import numpy as np
import pytest

from shiwu_worker.stages.encode import towers
from shiwu_worker.stages.encode.model import DeviceModel
from tests.support import schedules
from tests.support.device_targets import Target
from tests.support.planted_item import with_item

ROW_TOLERANCE = 2e-3
"""Of a vector's numbers, in another row or beside other images: a stream-K kernel may sum in another order there."""
SCHEDULES, FAKE_SCHEDULES = 2_000, 20


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_graph_gives_what_an_eager_pass_gives(target: Target, dtype: str) -> None:
    """In every batch size, also for counts that are padded."""
    graphed, eager = target.encoder(dtype=dtype), target.encoder(dtype=dtype, has_graphs=False)
    assert graphed._graphs is not None
    assert graphed._graphs.captured_sizes == (1, 4, 16)
    assert eager._graphs is None
    for count in (1, 3, 4, 9, 16):
        pixels = target.noise(count)
        np.testing.assert_allclose(graphed.encode(pixels), eager.encode(pixels), atol=ROW_TOLERANCE)


def test_three_batches_launched_ahead_keep_their_vectors(target: Target) -> None:
    """Collected in any order; the pixels may change once they are launched."""
    encoder = target.encoder(batch_sizes=(4,))
    pixels = target.noise(12)
    expected = [encoder.encode(pixels[i : i + 4]) for i in (0, 4, 8)]
    batches = [encoder.launch(pixels, list(range(i, i + 4))) for i in (0, 4, 8)]
    assert all(batch.is_under_way for batch in batches)
    pixels[:] = 0
    for n in (2, 0, 1):
        batches[n].wait()
        np.testing.assert_array_equal(encoder.collect(batches[n]), expected[n])


def test_vector_does_not_depend_on_row_and_neighbours(target: Target) -> None:
    """In one batch size, in a hundred orders and beside other images; within the tolerance of the documentation."""
    encoder = target.encoder(batch_sizes=(8,))
    pixels, others = target.noise(8), target.noise(8, seed=1)
    vectors = encoder.encode(pixels)
    for seed in range(100 if target.is_cuda else 4):
        order = np.random.default_rng(seed).permutation(8)
        np.testing.assert_allclose(encoder.encode(pixels[order]), vectors[order], atol=ROW_TOLERANCE)
    for row in range(8):
        mixed = others.copy()
        mixed[row] = pixels[row]
        np.testing.assert_allclose(encoder.encode(mixed)[row], vectors[row], atol=ROW_TOLERANCE)


def test_random_schedules_give_the_bits_of_a_serial_run(target: Target) -> None:
    """With three batches under way, beside batches in FP32 and labels that are encoded."""
    encoder = target.encoder(batch_sizes=(1, 2, 4, 8))
    batches = schedules.serial(encoder, target.noise(16), seed=0)
    exact, texts = encoder.encode_exact(target.noise(2)), encoder.encode_texts(["猫", "狗"])
    draw = random.Random(1)
    for number in range(SCHEDULES if target.is_cuda else FAKE_SCHEDULES):
        schedules.play(encoder, batches, steps=draw.randint(1, 12), draw=draw)
        if number % 10 == 0:
            np.testing.assert_array_equal(encoder.encode_exact(target.noise(2)), exact)
            np.testing.assert_array_equal(encoder.encode_texts(["猫", "狗"]), texts)


def test_all_batch_sizes_are_captured_before_the_first_job(target: Target) -> None:
    """Each agrees with FP32 in every row, or the start would drop it. A batch then says how long it took."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if target.is_cuda else (1, 2, 4, 8)
    encoder = target.encoder(batch_sizes=sizes)
    encoder.warm(choose_largest=True, is_thorough=True)
    assert encoder._graphs is not None
    assert encoder._graphs.captured_sizes == encoder.batch_sizes == sizes
    batch = encoder.launch(target.noise(sizes[-1]))
    encoder.collect(batch)
    assert batch.spent is not None
    assert 0 < batch.spent.cost == batch.spent.seconds < 10
    encoder.learn(batch)


def test_half_precision_agrees_with_fp32(target: Target) -> None:
    """Cosine of at least 0.999 for random images in every batch size."""
    sizes = (1, 2, 4, 8, 16, 32, 64) if target.is_cuda else (1, 4)
    half, full = (target.encoder(dtype=dtype, batch_sizes=sizes) for dtype in ("float16", "float32"))
    for size in sizes:
        pixels = target.noise(size, seed=size)
        assert (half.encode(pixels) * full.encode(pixels)).sum(axis=1).min() >= 0.999


def test_sizes_without_memory_are_left_out(target: Target) -> None:
    """The smaller ones have graphs and answer."""
    with target.little_memory() as sizes:
        encoder = target.encoder(batch_sizes=sizes)
        assert encoder._graphs is not None
        assert encoder.batch_sizes == encoder._graphs.captured_sizes == sizes[:-1]
        assert np.isfinite(encoder.encode(target.noise(2))).all()


@pytest.mark.parametrize("is_tried", [False, True], ids=["recognised", "tried"])
def test_planted_item_leaves_a_worker_that_answers(
    target: Target, monkeypatch: pytest.MonkeyPatch, is_tried: bool
) -> None:
    """No size has a graph, and all answer: where the operator is recognised, and where CUDA refuses the capture."""
    expected = target.encoder(has_graphs=False).encode(target.noise(9))
    monkeypatch.setattr(DeviceModel, "eager_tower", with_item(DeviceModel.eager_tower))
    if is_tried:
        monkeypatch.setattr(towers, "why_not_capturable", lambda *_: None)
    encoder = target.encoder()
    assert encoder._graphs is not None
    if target.is_cuda or not is_tried:  # the stand-in captures everything
        assert encoder._graphs.captured_sizes == ()
    for _ in range(3):
        np.testing.assert_allclose(encoder.encode(target.noise(9)), expected, atol=ROW_TOLERANCE)
    encoder.warm(is_thorough=True)
    assert encoder.batch_sizes == (1, 4, 16)
