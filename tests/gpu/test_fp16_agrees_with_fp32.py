"""On a CUDA device: FP16 vectors are FP32's within the promised cosine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from tests.support.pictogram import PICTOGRAM_ZH


@pytest.mark.gpu
def test_fp16_vectors_agree_with_fp32() -> None:
    """Cosine of at least 0.999 for random images in every batch size."""
    assert torch.cuda.is_available(), "this test is deselected where there is no GPU"
    folder = PICTOGRAM_ZH
    spec = read_image_spec(folder)
    half, full = (
        Encoder(
            EncoderOptions(
                folder=folder,
                model_id="m",
                revision="r",
                device="cuda",
                dtype=dtype,
                mean=spec.mean,
                std=spec.std,
            )
        )
        for dtype in ("float16", "float32")
    )
    for size in half.batch_sizes:
        batch = np.random.default_rng(size).integers(0, 256, (size, spec.height, spec.width, 3), np.uint8)
        assert (half.encode(batch) * full.encode(batch)).sum(axis=1).min() >= 0.999
