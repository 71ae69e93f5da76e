"""Reads from the checkpoint's image processor which pixels the model takes.

Every setting of the processor is applied as transformers applies it, or rejected. Reads JSON only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from shiwu_worker.checkpoints.checkpoint_files import CONFIG, Checkpoint, WrongCheckpoint, read_checkpoint, read_json


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The pixels that the model takes. `squash` changes the aspect ratio; `crop` keeps it and cuts the middle out."""

    width: int
    height: int
    resize: Literal["squash", "crop"]
    shortest_edge: int | None
    resample: int
    """Pillow's number of the filter: 2 bilinear, 3 bicubic."""
    mean: tuple[float, float, float]
    """Subtracted after `rescale`; zeros if the processor does not normalize."""
    std: tuple[float, float, float]
    rescale: float = 1 / 255
    """Each value from 0 to 255 is multiplied by it; 1 if the processor does not rescale."""


_CLIP: Final[Mapping[str, Any]] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_pad": False,
}
_HALF: Final[Mapping[str, Any]] = {
    **_CLIP,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "CLIPImageProcessor": _CLIP,
    "ChineseCLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": _HALF,
    "ViTImageProcessor": {**_HALF, "resample": 2, "default_to_square": True},
}
"""The defaults of transformers' classes for settings that a file omits; null does not mean the default."""
BY_MODEL_TYPE: Final = {
    "clip": "CLIPImageProcessor",
    "altclip": "CLIPImageProcessor",
    "metaclip_2": "CLIPImageProcessor",
    "chinese_clip": "ChineseCLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
}
"""The class that transformers uses if a file names none."""
_SWITCHES: Final = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"}
_SUFFIX: Final = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$")


def read_image_spec(folder: Path) -> ImageSpec:
    """Read the preprocessing of the checkpoint in this folder.

    Raises:
        WrongCheckpoint: when it has none, or one that the worker cannot follow exactly.
    """
    checkpoint = read_checkpoint(folder)
    path, config = _processor_config(checkpoint)
    return _Reader(path, _defaults(path, config, checkpoint), config).spec()


def _processor_config(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]]:
    """The file that has the settings transformers reads, and these settings."""
    for path in checkpoint.processor_files:
        config = read_json(path)
        if isinstance(nested := config.get("image_processor"), dict):
            return path, nested
        if path.name == "preprocessor_config.json":
            return path, config
    raise WrongCheckpoint(
        f"{checkpoint.base}: expected preprocessor_config.json, or processor_config.json with image_processor; "
        "download it from the same model"
    )


def _defaults(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> Mapping[str, Any]:
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if named is None:
        named = BY_MODEL_TYPE.get(str(read_json(checkpoint.base / CONFIG).get("model_type")))
    kind = _SUFFIX.sub("ImageProcessor", str(named))
    if kind not in DEFAULTS:
        raise WrongCheckpoint(f"{path}: expected image_processor_type of {', '.join(DEFAULTS)}, got {named!s:.60}")
    return DEFAULTS[kind]


class _Reader:
    """Reads the settings of one processor, with the defaults of its class."""

    def __init__(self, path: Path, defaults: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = {**defaults, **config}

    def spec(self) -> ImageSpec:
        self._check_switches()
        width, height, edge = self._sizes()
        rescale = self._number("rescale_factor") if self._config["do_rescale"] else 1.0
        is_normalized = self._config["do_normalize"]
        mean, std = (self._channels(key) if is_normalized else None for key in ("image_mean", "image_std"))
        if std and 0.0 in std:
            raise self._wrong("image_std", "three numbers that are not 0")
        return ImageSpec(
            width=width,
            height=height,
            resize="squash" if edge is None else "crop",
            shortest_edge=edge,
            resample=self._resample(),
            mean=mean or (0.0, 0.0, 0.0),
            std=std or (1.0, 1.0, 1.0),
            rescale=rescale,
        )

    def _check_switches(self) -> None:
        switches = {key: value for key, value in self._config.items() if key.startswith("do_")}
        for key, value in switches.items():
            if not isinstance(value, bool | None):
                raise self._wrong(key, "true or false")
            if value and (key not in _SWITCHES or key == "do_pad"):
                raise self._wrong(key, "false, since the worker does not do this")
        if not self._config["do_resize"]:
            raise self._wrong("do_resize", "true, since images come in any size and the model takes one")
        if self._config.get("use_square_size"):
            raise self._wrong("use_square_size", "a size with height and width instead")

    def _sizes(self) -> tuple[int, int, int | None]:
        """Width and height of the model's images, and the shortest edge of the resized image if it is cropped."""
        size = self._size("size", is_square=self._config.get("default_to_square") is True)
        crop = self._size("crop_size", is_square=True) if self._config["do_center_crop"] else None
        if set(size) == {"height", "width"}:
            if crop is not None and crop != size:
                raise self._wrong("crop_size", f"the same as size, {size}, or a size with shortest_edge")
            return size["width"], size["height"], None
        if set(size) != {"shortest_edge"}:
            raise self._wrong("size", "height and width, or shortest_edge with do_center_crop")
        edge = size["shortest_edge"]
        if crop is None:
            raise self._wrong("do_center_crop", "true if size has a shortest_edge, since the model takes one size")
        if set(crop) != {"height", "width"} or max(crop.values()) > edge:
            raise self._wrong("crop_size", f"height and width of at most the shortest edge, {edge}")
        return crop["width"], crop["height"], edge

    def _size(self, key: str, *, is_square: bool) -> dict[str, int]:
        """A size as transformers understands a number, a pair or a mapping."""
        value = self._config[key]
        if _is_length(value):
            return {"height": value, "width": value} if is_square else {"shortest_edge": value}
        if isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if not isinstance(value, dict) or not value or not all(map(_is_length, value.values())):
            raise self._wrong(key, "a number of pixels, [height, width], or a mapping of both")
        return dict(value)

    def _resample(self) -> int:
        value = self._config["resample"]
        if type(value) is not int or not 0 <= value <= 5:
            raise self._wrong("resample", "a number of Pillow's filters, 0 to 5")
        return int(value)

    def _number(self, key: str) -> float:
        value = self._config[key]
        if type(value) not in {int, float} or not math.isfinite(value):
            raise self._wrong(key, "a number")
        return float(value)

    def _channels(self, key: str) -> tuple[float, float, float]:
        value = self._config[key]
        three = value if isinstance(value, list) else [value] * 3
        if len(three) != 3 or not all(type(number) in {int, float} and math.isfinite(number) for number in three):
            raise self._wrong(key, "three numbers")
        red, green, blue = map(float, three)
        return red, green, blue

    def _wrong(self, key: str, expected: str) -> WrongCheckpoint:
        return WrongCheckpoint(f"{self._path}: {key}: expected {expected}, got {self._config.get(key)!r:.80}")


def _is_length(value: object) -> bool:
    return type(value) is int and 0 < value <= 4096
