"""Models by name: the embedded one, published shapes with random weights, or a folder.

`python -m bench.checkpoints NAME FOLDER` writes the files of one model. `checkpoint` does so once, in another process,
and keeps them in the cache. The shapes are those of the config.json of OFA-Sys/chinese-clip-vit-base-patch16 and
OFA-Sys/chinese-clip-vit-large-patch14; `siglip-so400m` has the image tower of google/siglip-so400m-patch14-224, whose
sides no power of two divides, and a small text tower.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.pictogram import PICTOGRAM_ZH

from bench.cache import made_once
from shiwu_worker.checkpoints.model_files import EMBEDDED, model_folder, model_name

SIGLIP: Final = "siglip-so400m"
NAMES: Final = ("embedded", "vit-b-16", "vit-l-14", SIGLIP)
RECIPE: Final = 2
"""Raised when the written files change, so that no old files are taken from the cache."""
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
VOCAB: Final = 21128


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a model."""

    patch: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    projection: int


SHAPES: Final = {
    "vit-b-16": Shape(patch=16, hidden=768, intermediate=3072, layers=12, heads=12, projection=512),
    "vit-l-14": Shape(patch=14, hidden=1024, intermediate=4096, layers=24, heads=16, projection=768),
    SIGLIP: Shape(patch=14, hidden=1152, intermediate=4304, layers=27, heads=16, projection=0),
}
SIGLIP_TEXT_LAYERS: Final = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to measure."""

    name: str
    folder: Path
    setting: str | None
    """What SHIWU_MODEL is set to; None leaves it unset."""
    is_random: bool
    gflop: float
    """Operations of the image tower for one image; a multiplication with its addition counts as two."""


def checkpoint(asked: str) -> Checkpoint:
    """Return the model of this name or folder; make it if necessary."""
    if asked == "embedded":
        folder = model_folder(None)
        return Checkpoint(EMBEDDED, folder, None, is_random=False, gflop=picture_gflop(folder))
    if asked in SHAPES:
        folder = made_once(f"{asked}-random-{RECIPE}", lambda unfinished: _make_in_process(asked, unfinished))
        return Checkpoint(asked, folder, str(folder), is_random=True, gflop=picture_gflop(folder))
    folder = model_folder(str(Path(asked).resolve()))
    return Checkpoint(model_name(str(folder)), folder, str(folder), is_random=False, gflop=picture_gflop(folder))


def processor_folder() -> Path:
    """Return a folder with the published preprocessing only, for benchmarks without weights."""
    return made_once(f"processor-224-{RECIPE}", _write_preprocessor)


def picture_gflop(folder: Path) -> float:
    """Return the GFLOP of an image tower: 35.13 for ViT-B/16, 162.0 for ViT-L/14, from their configs.

    A tower that is no vision transformer is run once with torch's counter.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    if "patch_size" not in vision:
        return _counted_gflop(folder, vision["image_size"])
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    # SigLIP has no class token; an attention over all patches makes its vector.
    is_pooled = config.get("model_type") == "siglip"
    tokens = patches if is_pooled else patches + 1
    layer = tokens * (4 * hidden**2 + 2 * hidden * vision["intermediate_size"]) + 2 * tokens**2 * hidden
    pooled = 2 * (patches + 1) * hidden**2 + 2 * hidden * vision["intermediate_size"] if is_pooled else 0
    ends = patches * 3 * patch**2 * hidden + hidden * config.get("projection_dim", 0) + pooled
    return float(2 * (vision["num_hidden_layers"] * layer + ends) / 1e9)


def _counted_gflop(folder: Path, side: int) -> float:
    import torch  # noqa: PLC0415 only where a model is counted
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 only where a model is made or counted
    from transformers import AutoModel  # noqa: PLC0415 only where a model is made or counted

    model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).float().eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.get_image_features(pixel_values=torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops() / 1e9)


def _make_in_process(name: str, folder: Path) -> None:
    """Make the model in another process, whose memory torch uses."""
    print(f"making {name} with random weights, once …", file=sys.stderr)
    command = [sys.executable, "-m", "bench.checkpoints", name, str(folder)]
    subprocess.run(command, check=True, timeout=600)


def _make(name: str, folder: Path) -> None:
    import torch  # noqa: PLC0415 only where a model is made
    from transformers import ChineseCLIPConfig, ChineseCLIPModel  # noqa: PLC0415 only where a model is made or counted

    torch.manual_seed(0)
    if name == SIGLIP:
        make_siglip(SHAPES[name], folder)
        return
    model = ChineseCLIPModel(ChineseCLIPConfig(**_config(SHAPES[name]))).eval()
    model.save_pretrained(folder)
    _write_vocabulary(folder)
    _write_preprocessor(folder)


def make_siglip(shape: Shape, folder: Path, *, image_size: int = 224) -> None:
    """Write a SigLIP with random weights, whose tokenizer knows single characters."""
    from tests.support.encoders import TEXT, saved  # noqa: PLC0415 only where a model is made
    from transformers import SiglipConfig, SiglipModel  # noqa: PLC0415 only where a model is made

    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
    }
    vision = sizes | {"num_hidden_layers": shape.layers, "patch_size": shape.patch, "image_size": image_size}
    text = {**TEXT, **sizes, "num_hidden_layers": SIGLIP_TEXT_LAYERS, "projection_size": shape.hidden}
    saved(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval(), folder)
    config = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    text_of = json.dumps(config, indent=2)
    (folder / "preprocessor_config.json").write_text(text_of + "\n", encoding="utf-8")


def _write_vocabulary(folder: Path) -> None:
    """Write the words of the tests' pictogram model, filled up to the published number of tokens."""
    words = (PICTOGRAM_ZH / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = [word for word in words if word]
    words += [f"[unused{number}]" for number in range(len(words), VOCAB)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "projection_dim": shape.projection,
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "patch_size": shape.patch,
            "image_size": 224,
            "hidden_act": "quick_gelu",
            "projection_dim": shape.projection,
        },
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
        },
    }


def _write_preprocessor(folder: Path) -> None:
    """Write the published preprocessing: squashed to a square, nothing cropped."""
    config = {
        "image_processor_type": "ChineseCLIPImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    text = json.dumps(config, indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    _make(sys.argv[1], Path(sys.argv[2]))
