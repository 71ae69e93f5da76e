"""What the model wants to see, as its checkpoint says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shiwu_worker.errors import ExitCode, FatalError


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What the model wants to see. `resize` squash changes the aspect; crop keeps it and cuts the middle out."""

    width: int
    height: int
    resize: Literal["squash", "crop"]
    shortest_edge: int | None
    resample: int
    """Pillow's number of the filter: 2 bilinear, 3 bicubic."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_image_spec(folder: Path) -> ImageSpec:
    """Read the checkpoint's preprocessing. Never guessed from the model's class: the checkpoint often differs from it.

    Raises:
        FatalError: with ExitCode.MODEL when the folder has none, or one that this room can't do.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config = config.get("image_processor", config)
            if "image_mean" in config:
                return _spec(config, path)
    raise FatalError(ExitCode.MODEL, f"{folder}: expected preprocessor_config.json with image_mean, image_std and size")


def _spec(config: dict[str, Any], path: Path) -> ImageSpec:
    def pair(value: Any) -> tuple[int, int] | None:
        if isinstance(value, int):
            return value, value
        return (value["height"], value["width"]) if isinstance(value, dict) and "height" in value else None

    size = config.get("size")
    exact = pair(size) if isinstance(size, dict) else None
    edge = size if isinstance(size, int) else (size or {}).get("shortest_edge")
    crop = pair(config.get("crop_size")) if config.get("do_center_crop") else None
    height, width = crop or exact or (edge, edge)
    if not (isinstance(height, int) and isinstance(width, int)) or (edge and not crop and not exact):
        raise FatalError(ExitCode.MODEL, f"{path}: expected a fixed picture size, got size={size!r}")
    mean, std = (tuple(float(x) for x in config[key]) for key in ("image_mean", "image_std"))
    return ImageSpec(
        width=width,
        height=height,
        resize="squash" if exact and not crop else "crop",
        shortest_edge=edge if edge else (min(exact) if exact and crop else None),
        resample=int(config.get("resample", 3)),
        mean=mean,  # type: ignore[arg-type]  # three numbers, as every RGB checkpoint has
        std=std,  # type: ignore[arg-type]  # the same
    )
