"""Encoders and images of the steps; a rehearsal takes the tests' pictogram model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.support.pictogram import PICTOGRAM_ZH

from bench.checkpoints import checkpoint
from shiwu_worker.health.canary import known_images
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions


def model_folder_of(name: str, *, tiny: bool) -> Path:
    """The folder of a model of bench.checkpoints, or of the pictogram model."""
    return PICTOGRAM_ZH if tiny else checkpoint(name).folder


def open_encoder(
    name: str, *, sizes: tuple[int, ...], tiny: bool, dtype: str | None = None, **switches: Any
) -> tuple[Encoder, ImageSpec]:
    """An encoder that is not warm, in FP16 on a GPU."""
    folder = model_folder_of(name, tiny=tiny)
    spec = read_image_spec(folder)
    is_cuda = torch.cuda.is_available()
    options: dict[str, Any] = {
        "folder": folder,
        "model_id": name,
        "revision": "bench",
        "device": "cuda" if is_cuda else "cpu",
        "dtype": dtype or ("float16" if is_cuda else "float32"),
        "batch_sizes": sizes,
        "mean": spec.mean,
        "std": spec.std,
        "rescale": spec.rescale,
        "known_images": known_images(spec.height, spec.width),
        "threads": 1,
    }
    return Encoder(EncoderOptions(**(options | switches))), spec


def pixels_of(spec: ImageSpec, count: int) -> NDArray[np.uint8]:
    """Random images; products of equal numbers would be faster."""
    return np.random.default_rng(0).integers(0, 256, (count, spec.height, spec.width, 3), np.uint8)
