"""Allowed batch sizes, and the images that a worker holds because of them."""

from __future__ import annotations

import math

import pytest

from shiwu_worker.config import batches
from shiwu_worker.config.batches import batch_sizes, may_use_gpu, slot_count, slots_for
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import load_shares
from shiwu_worker.policy.limits import LABEL_SLOTS
from shiwu_worker.runtime.nvidia import Gpu
from tests.support.processes import ROOT

ON_CPU = (1, 2, 4, 8, 16, 32, 64)
ON_GPU = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@pytest.mark.parametrize(
    ("device", "largest", "sizes"),
    [
        ("cpu", 0, ON_CPU),
        ("cpu", 5, (1, 2, 4, 5)),
        ("cpu", 128, (*ON_CPU, 128)),
        ("cuda", 0, ON_GPU),
        ("cuda:1", 64, ON_GPU[:9]),
        ("cuda", 40, (1, 2, 4, 8, 16, 24, 32, 40)),
        ("cuda", 20, (1, 2, 4, 8, 16, 20)),
    ],
)
def test_sizes_follow_device_and_largest_batch(device: str, largest: int, sizes: tuple[int, ...]) -> None:
    """Powers of two, on a GPU with steps in between, and the size that the operator set."""
    assert batch_sizes(Settings(device=device, max_batch=largest)) == sizes


@pytest.mark.parametrize(("visible", "gpus", "is_gpu"), [(None, 1, True), (None, 0, False), ("", 1, False)])
def test_auto_device_is_asked_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, is_gpu: bool
) -> None:
    """Slots are reserved before torch is imported."""
    monkeypatch.setattr(batches, "list_gpus", lambda: [Gpu("gpu0", "GPU-0")] * gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = Settings(device="auto", loaders=2, loader_threads=8)
    assert may_use_gpu(settings) == is_gpu
    needed = 3 * (512 if is_gpu else 64) + 16
    assert slot_count(settings) == math.ceil(needed / 0.75) + LABEL_SLOTS


def test_bulk_may_hold_all_slots_that_batches_need() -> None:
    """The reserve of interactive comes on top, and there is none where one lane is served or the operator set slots."""
    settings = Settings(device="cpu", loaders=2, loader_threads=8)
    slots = slots_for(settings, 64)
    assert slots - load_shares(settings).reserve_of(slots) >= 3 * 64 + 16
    assert slots_for(Settings(device="cpu", loaders=2, loader_threads=8, lanes="bulk"), 64) == 3 * 64 + 16
    assert slots_for(Settings(device="cpu", slots=7), 64) == 7


def test_memory_for_pixels_is_documented() -> None:
    """docs/operations.md computes it for three loaders of eight threads and images of 224 × 224."""
    text = " ".join((ROOT / "docs" / "operations.md").read_text(encoding="utf-8").split())
    cpu, gpu = (Settings(device=device, loaders=3, loader_threads=8) for device in ("cpu", "cuda"))
    for what, slots in {
        "= {} MB on a CPU": slot_count(cpu),
        "= {} MB on a GPU": slot_count(gpu),
        "with batches of 256, {} MB": slots_for(gpu, 256) + LABEL_SLOTS,
    }.items():
        assert what.format(round(slots * 224 * 224 * 3 / 1e6)) in text
