"""Batch normalisations that became parts of convolutions: the same vectors, from fewer steps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import nn
from transformers import (
    BertConfig,
    EfficientNetConfig,
    MobileNetV1Config,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.stages.encode.capture_rules import why_not_capturable
from shiwu_worker.stages.encode.fusion import fuse
from shiwu_worker.stages.encode.towers import eager_tower
from tests.support.encoders import TEXT, make_encoder, noise

NORMALISATION: dict[str, Any] = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "rescale": 1 / 255}
IMAGES = torch.from_numpy(noise(4, 64))
BLOCKS: dict[str, Any] = {
    "image_size": 64,
    "hidden_dim": 640,
    "width_coefficient": 0.5,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 4],
}


def dual_encoder(vision: Any) -> Any:
    """A model with this image tower, random weights, and statistics as if it had been trained."""
    generator = torch.Generator().manual_seed(7)
    vision.hidden_size = vision.hidden_dim
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, BertConfig(**TEXT), projection_dim=8)
    model = VisionTextDualEncoderModel(config).eval()
    for norm in [part for part in model.vision_model.modules() if isinstance(part, nn.BatchNorm2d)]:
        for values, low, high in (
            (norm.weight.data, 0.5, 1.5),
            (norm.bias.data, -1, 1),
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.5, 2),
        ):
            values.uniform_(low, high, generator=generator)  # type: ignore[union-attr]  # these have statistics
    return model


def vectors_of(model: Any) -> torch.Tensor:
    """The vectors of the images, as a worker's tower in FP32 makes them."""
    tower = eager_tower(model, dtype=torch.float32, device=torch.device("cpu"), **NORMALISATION)
    assert why_not_capturable(tower, IMAGES) is None
    return tower(IMAGES)


def norms_of(model: Any) -> list[nn.Module]:
    """The batch normalisations that are left."""
    return [part for part in model.vision_model.modules() if isinstance(part, nn.BatchNorm2d)]


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["relu", "relu6", "swish", "gelu"])
def test_folded_tower_gives_the_same_vectors(activation: str) -> None:
    """Twice, because activations overwrite their input; and images that were given stay as they are."""
    model = dual_encoder(EfficientNetConfig(hidden_act=activation, **BLOCKS))
    folded = copy.deepcopy(model)
    assert fuse(folded, ("norms",), **NORMALISATION) == ("norms",)
    assert norms_of(model)
    assert not norms_of(folded)
    kernels = [part.weight for part in folded.vision_model.modules() if isinstance(part, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    expected, before = vectors_of(model), IMAGES.clone()
    for _ in range(2):
        torch.testing.assert_close(vectors_of(folded), expected, rtol=0, atol=1e-5)
    assert torch.equal(IMAGES, before)


def test_other_layers_stay_as_they_are() -> None:
    """A class whose order of steps is not known, and a normalisation that still learns."""
    unknown = dual_encoder(MobileNetV1Config(image_size=64, depth_multiplier=0.25, hidden_dim=256))
    learning = dual_encoder(EfficientNetConfig(**BLOCKS)).train()
    for model in (unknown, learning):
        count = len(norms_of(model))
        assert count
        assert fuse(model, ("norms",), **NORMALISATION) == ()
        assert len(norms_of(model)) == count


def test_worker_on_a_cpu_folds_the_embedded_model() -> None:
    """Without a setting, with its start's check passed, and with the vectors of the model as it is."""
    folder = model_folder(None)
    images = noise(3, 224)
    with capture_logs() as logs:
        usual = make_encoder(folder, threads=1, known_images=images)
    assert [line["steps"] for line in logs if line["event"] == "model_fused"] == [["norms"]]
    plain = make_encoder(folder, threads=1, known_images=images, fusions=())
    np.testing.assert_allclose(usual.encode(images), plain.encode(images), atol=1e-5)
    np.testing.assert_allclose(usual.encode_exact(images), plain.encode(images), atol=1e-5)
