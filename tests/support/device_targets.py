"""Models and devices on which the checks of `tests/gpu` run: a CUDA device, or a stand-in for it on the CPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from bench.checkpoints import SIGLIP, Shape, checkpoint, make_siglip
from numpy.typing import NDArray

from shiwu_worker.health.canary import known_images
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from tests.support.fake_accelerator import FakeAccelerator, Work
from tests.support.pictogram import PICTOGRAM_ZH

CUDA_MODELS: Final = ("embedded", "pictogram", "vit-b-16", SIGLIP)
FAKE_MODELS: Final = ("tiny-siglip",)
TINY_SIGLIP: Final = Shape(patch=8, hidden=24, intermediate=44, layers=2, heads=2, projection=0)
"""No side is a multiple of eight but the hidden one, as in the published shape."""
LIMITED_BYTES: Final = 256 << 20
"""Memory for passes where the device's memory is limited."""


class LittleMemory(FakeAccelerator):
    """A fake device without memory for batches above a size."""

    largest: int | None = None

    def run(self, work: Work, raw: torch.Tensor) -> torch.Tensor:
        """Queue a pass, or raise what CUDA raises."""
        if self.largest is not None and len(raw) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(work, raw)


@dataclass(frozen=True)
class Target:
    """One model on one device. A test that makes several encoders needs memory for all of them."""

    model: str
    folder: Path
    is_cuda: bool

    @property
    def spec(self) -> ImageSpec:
        """The model's preprocessing."""
        return read_image_spec(self.folder)

    def encoder(self, **options: Any) -> Encoder:
        """An encoder with FP16 on CUDA, or FP32 on the stand-in, in batches of 1, 4 and 16."""
        spec = self.spec
        common: dict[str, Any] = {
            "folder": self.folder,
            "model_id": self.model,
            "revision": "r",
            "device": "cuda" if self.is_cuda else "cpu",
            "dtype": "float16" if self.is_cuda else "float32",
            "batch_sizes": (1, 4, 16),
            "mean": spec.mean,
            "std": spec.std,
            "rescale": spec.rescale,
            "known_images": known_images(spec.height, spec.width),
        }
        return Encoder(EncoderOptions(**(common | options)))

    def noise(self, count: int, *, seed: int = 0) -> NDArray[np.uint8]:
        """Random pictures."""
        return np.random.default_rng(seed).integers(0, 256, (count, self.spec.height, self.spec.width, 3), np.uint8)

    @contextmanager
    def little_memory(self) -> Iterator[tuple[int, ...]]:
        """Limit the device's memory, and yield batch sizes of which the last one does not fit and the first does."""
        if not self.is_cuda:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(LittleMemory, "largest", 2)
                yield (1, 2, 4)
            return
        alone = self.encoder(batch_sizes=(1,))
        alone.encode(self.noise(1))
        used = torch.cuda.max_memory_reserved()
        del alone
        release()
        total = torch.cuda.get_device_properties(0).total_memory
        # Its pixels alone take four times the limit in FP32.
        largest = 4 * LIMITED_BYTES // (self.spec.height * self.spec.width * 3 * 4)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (used + LIMITED_BYTES) / total))
        try:
            yield (1, 2, largest)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def open_target(name: str, *, is_cuda: bool, folder: Path) -> Target:
    """The model of this name; a small one is made in `folder`."""
    if name == "pictogram":
        return Target(name, PICTOGRAM_ZH, is_cuda)
    if name == "tiny-siglip":
        made = folder / name
        make_siglip(TINY_SIGLIP, made, image_size=24)
        return Target(name, made, is_cuda)
    return Target(name, checkpoint(name).folder, is_cuda)


def vector_width(folder: Path) -> int:
    """Length of the model's vectors, from its configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("projection_dim") or config["vision_config"]["hidden_size"])


def release() -> None:
    """Give the memory of dropped encoders back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
