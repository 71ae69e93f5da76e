"""The image processor's settings give the pixels that transformers' own processor gives, or are refused."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import decode
from shiwu_worker.stages.decode.image_spec import DEFAULTS, ImageSpec, read_image_spec
from shiwu_worker.stages.encode.towers import eager_tower
from tests.support import pictures
from tests.support.checkpoints import CONFIG_2022, quiet_transformers, write_json, write_safetensors

LIMITS = DecodeLimits(max_pixels=1_000_000, max_side=2000, formats=("PNG",))
CLASSES: dict[str, Any] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
}
if find_spec("transformers.models.chinese_clip.image_processing_pil_chinese_clip"):  # not in the lowest version
    CLASSES["ChineseCLIPImageProcessor"] = transformers.ChineseCLIPImageProcessorPil
SIZES: dict[str, dict[str, Any]] = {
    "square": {"size": {"height": 48, "width": 48}, "do_center_crop": False},
    "oblong": {"size": {"height": 40, "width": 56}, "do_center_crop": False},
    "pair": {"size": [40, 56], "do_center_crop": False},
    "edge and crop": {"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": {"height": 40, "width": 48}},
    "numbers": {"size": 48, "do_center_crop": True, "crop_size": 48, "default_to_square": False},
    "number that is a square": {"size": 48, "do_center_crop": False, "default_to_square": True},
    "crop of the whole": {"size": {"height": 48, "width": 48}, "do_center_crop": True, "crop_size": 48},
}
VALUES: dict[str, dict[str, Any]] = {
    "usual": {},
    "null is no": {"do_normalize": None, "do_rescale": None, "do_convert_rgb": None, "do_pad": None, "pad_size": None},
    "null that is not asked": {"do_normalize": False, "image_mean": None, "image_std": None},
    "own mean": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "one number for all": {"image_mean": 0.25, "image_std": 0.75},
    "not normalized": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "to two": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose processor each test replaces."""
    with quiet_transformers():
        folder = write_safetensors(tmp_path_factory.mktemp("checkpoint") / "m")
    (folder / "preprocessor_config.json").unlink()
    return folder


def read(folder: Path, config: dict[str, Any], *, file: str = "preprocessor_config.json") -> ImageSpec:
    """The spec of a processor with this configuration."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / file, config)
    return read_image_spec(folder)


def seen(spec: ImageSpec, image: Image.Image) -> np.ndarray[Any, Any]:
    """What the model's image tower gets: decoded by the loader, normalized as on the device."""
    got: list[torch.Tensor] = []

    class Model:
        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            """Keep the pixels."""
            got.append(pixel_values)
            return pixel_values.flatten(1)

    pixels, _ = decode(pictures.png(image), spec=spec, limits=LIMITS, is_exact=True)
    tower = eager_tower(
        Model(),
        dtype=torch.float32,
        mean=spec.mean,
        std=spec.std,
        rescale=spec.rescale,
        device=torch.device("cpu"),
    )
    tower(torch.from_numpy(pixels[None].copy()))
    return got[0].numpy()[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """They stand in for what a file leaves out, and must follow when transformers changes them."""
    processor = CLASSES[kind]
    assert not {"_preprocess", "resize", "center_crop", "rescale", "normalize", "pad"} & vars(processor).keys()
    for key, value in DEFAULTS[kind].items():
        theirs = getattr(processor, key, None)
        assert (list(theirs) if isinstance(theirs, tuple) else theirs or False) == (value or False), key


@pytest.mark.parametrize(
    ("kind", "size", "values"),
    [
        *(("CLIPImageProcessor", *both) for both in itertools.product(SIZES, VALUES)),
        *((kind, "square", values) for kind in CLASSES for values in ("usual", "null is no")),
    ],
)
def test_pixels_are_those_of_the_processor(checkpoint: Path, kind: str, size: str, values: str) -> None:
    """For every switch, factor and form of a size; as the processor class reads the same configuration."""
    config = {"image_processor_type": kind, "resample": 2, **SIZES[size], **VALUES[values]}
    image = pictures.picture("熊猫").convert("RGB").resize((97, 65))
    theirs = CLASSES[kind].from_dict(dict(config))(images=image, return_tensors="np")["pixel_values"][0]
    ours = seen(read(checkpoint, config), image)
    assert ours.shape == theirs.shape
    # Levels may differ by one where Pillow and numpy round.
    step = max(abs(float(theirs.max() - theirs.min())) / 255, 1e-6)
    assert np.abs(ours - theirs.astype(np.float32)).max() <= 2 * step
    assert np.abs(ours - theirs.astype(np.float32)).mean() <= step / 100


@pytest.mark.parametrize("name", ["CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", None])
def test_class_may_have_an_older_or_newer_name(checkpoint: Path, name: str | None) -> None:
    """feature_extractor_type is what transformers wrote until 2023; without a class the model's type decides."""
    config = {"feature_extractor_type": name, "size": 40, "crop_size": 32}
    spec = read(checkpoint, config)
    assert (spec.width, spec.height, spec.shortest_edge, spec.resize) == (32, 32, 40, "crop")


def test_nested_settings_of_processor_config_come_first(checkpoint: Path) -> None:
    """transformers 5 writes them there; a preprocessor_config.json beside it may be older."""
    config = {"processor_class": "CLIPProcessor", "image_processor": {"image_processor_type": "ViTImageProcessor"}}
    assert read(checkpoint, config, file="processor_config.json").resample == 2
    write_json(checkpoint / "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"})
    assert read_image_spec(checkpoint).resample == 2


def test_processor_config_without_settings_is_passed_over(checkpoint: Path) -> None:
    """transformers 4 wrote one beside preprocessor_config.json that says nothing of images."""
    with pytest.raises(WrongCheckpoint, match=r"expected preprocessor_config\.json"):
        read(checkpoint, {"processor_class": "CLIPProcessor"}, file="processor_config.json")
    write_json(checkpoint / "preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"})
    assert read_image_spec(checkpoint).width == 224


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_resize": None}, "do_resize"),
        ({"do_pad": True}, "do_pad"),
        ({"do_thumbnail": True}, "do_thumbnail"),
        ({"use_square_size": True}, "use_square_size"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "do_center_crop"),
        ({"size": {"shortest_edge": 224, "longest_edge": 336}}, "size"),
        ({"size": {"max_height": 224, "max_width": 224}}, "size"),
        ({"size": {"height": 224}}, "size"),
        ({"size": {}}, "size"),
        ({"size": None}, "size"),
        ({"crop_size": None}, "crop_size"),
        ({"resample": None}, "resample"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"image_mean": None}, "image_mean"),
        ({"image_std": None}, "image_std"),
        ({"size": [224]}, "size"),
        ({"size": "224"}, "size"),
        ({"size": 224.0}, "size"),
        ({"size": True}, "size"),
        ({"size": 0}, "size"),
        ({"size": {"height": 224, "width": 9_000_000}}, "size"),
        ({"size": {"height": 224, "width": 224}, "crop_size": 192}, "crop_size"),
        ({"size": 224, "crop_size": 256}, "crop_size"),
        ({"size": 224, "crop_size": {"shortest_edge": 224}}, "crop_size"),
        ({"resample": 6}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "image_std"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "image_processor_type"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_done_are_refused(checkpoint: Path, config: dict[str, Any], key: str) -> None:
    """One line with the file, the key, what was expected and what came."""
    with pytest.raises(WrongCheckpoint) as caught:
        read(checkpoint, {"image_processor_type": "CLIPImageProcessor", **config})
    text = str(caught.value)
    assert text.startswith(f"{checkpoint / 'preprocessor_config.json'}: ")
    assert f"{key}: expected" in text or f"expected {key}" in text
    assert "\n" not in text


def test_model_without_a_known_processor_is_refused(checkpoint: Path) -> None:
    """Nothing is guessed where neither the file nor the model's type names a class."""
    write_json(checkpoint / "config.json", {**CONFIG_2022, "model_type": "align"})
    try:
        with pytest.raises(WrongCheckpoint, match="expected image_processor_type"):
            read(checkpoint, {"size": 224})
    finally:
        write_json(checkpoint / "config.json", CONFIG_2022)
