"""On a CUDA device: graphs, pinned staging buffers and batches launched ahead give what plain eager passes give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from shiwu_worker.stages.encode.towers import GraphedTower
from tests.support.pictogram import PICTOGRAM_ZH

FOLDER = PICTOGRAM_ZH
SPEC = read_image_spec(FOLDER)
pytestmark = pytest.mark.gpu


def make(**options: object) -> Encoder:
    """An encoder on the first GPU."""
    assert torch.cuda.is_available(), "these tests are deselected where there is no GPU"
    common = {"model_id": "m", "revision": "r", "device": "cuda", "mean": SPEC.mean, "std": SPEC.std}
    return Encoder(EncoderOptions(folder=FOLDER, **(common | options)))  # type: ignore[arg-type]  # typed by name


def noise(count: int) -> NDArray[np.uint8]:
    """Random pictures."""
    return np.random.default_rng(count).integers(0, 256, (count, SPEC.height, SPEC.width, 3), np.uint8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_graph_gives_what_an_eager_pass_gives(dtype: str) -> None:
    """In every batch size, also for counts that are padded."""
    graphed, eager = (
        make(dtype=dtype, batch_sizes=(1, 4, 16)),
        make(dtype=dtype, batch_sizes=(1, 4, 16), has_graphs=False),
    )
    assert isinstance(graphed._staging._tower, GraphedTower)
    assert graphed._staging._tower.captured_sizes == (1, 4, 16)
    for count in (1, 3, 4, 9, 16):
        np.testing.assert_allclose(graphed.encode(noise(count)), eager.encode(noise(count)), atol=2e-3)


def test_batches_launched_ahead_keep_their_own_vectors() -> None:
    """Three on their way at a time, collected in any order; the pixels may change once they are launched."""
    encoder = make(batch_sizes=(4,))
    pixels = noise(12)
    expected = [encoder.encode(pixels[i : i + 4]) for i in (0, 4, 8)]
    flights = [encoder.launch(pixels, list(range(i, i + 4))) for i in (0, 4, 8)]
    assert all(flight.is_under_way for flight in flights)
    pixels[:] = 0
    for n in (2, 0, 1):
        flights[n].wait()
        np.testing.assert_array_equal(encoder.collect(flights[n]), expected[n])


def test_a_picture_has_the_same_bits_whatever_its_neighbours() -> None:
    """In one batch size, replayed a hundred times."""
    encoder = make(batch_sizes=(8,))
    pixels = noise(8)
    vectors = encoder.encode(pixels)
    for seed in range(100):
        order = np.random.default_rng(seed).permutation(8)
        np.testing.assert_array_equal(encoder.encode(pixels[order]), vectors[order])


def test_all_batch_sizes_are_captured_before_the_first_job() -> None:
    """Which of them is used is learned later; a batch then says how long the device worked on it."""
    encoder = make(batch_sizes=(1, 2, 4, 8, 16, 32, 64))
    encoder.warm(choose_largest=True)
    assert encoder.batch_sizes == encoder.timed_sizes == (1, 2, 4, 8, 16, 32, 64)
    assert isinstance(encoder._staging._tower, GraphedTower)
    assert encoder._staging._tower.captured_sizes == encoder.batch_sizes
    assert encoder.info.dtype == "float16"
    assert encoder.size_policy.largest > 1
    flight = encoder.launch(noise(64))
    encoder.collect(flight)
    assert flight.spent is not None
    assert 0 < flight.spent.cost == flight.spent.seconds < 1
    encoder.learn(flight)
