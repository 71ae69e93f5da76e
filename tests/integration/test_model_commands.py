"""`shiwu-worker --fetch-model` and `--convert`: what they leave can be loaded, and a failure leaves nothing whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open

from shiwu_worker.checkpoints import checkpoint_files
from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint, read_checkpoint
from shiwu_worker.checkpoints.model_files import model_revision
from shiwu_worker.commands import model_commands
from shiwu_worker.commands.model_commands import COMPLETE_FILE, convert_model, fetch_model
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
from tests.support.adapters import adapted
from tests.support.checkpoints import SIDE, split_weights, weights_2022, write_2022, write_json, write_safetensors
from tests.support.hub_server import HubServer

ID = "OFA-Sys/chinese-clip-tiny"
# As in tests/unit/stages/test_checkpoint.py.
pytestmark = [
    pytest.mark.usefixtures("silent_transformers"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning"),
]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository in the layout of 2022, with a file of another framework."""
    folder = write_2022(tmp_path / "published")
    (folder / "flax_model.msgpack").write_bytes(b"x")
    (folder / "README.md").write_bytes(b"about")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub without models, which this process's library takes for its own."""
    server = HubServer().start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.stop()


def vectors(folder: Path) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Of two images and two texts, as the worker computes them."""
    spec = read_image_spec(folder)
    options = EncoderOptions(
        folder=folder,
        model_id="m",
        revision="r",
        device="cpu",
        dtype="float32",
        batch_sizes=(2,),
        mean=spec.mean,
        std=spec.std,
    )
    encoder = Encoder(options)
    pixels = np.random.default_rng(2).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    return [encoder.encode(pixels), encoder.encode_texts(["熊猫", "一张狗的照片"])]


# ------------------------------------------------------------------------------------ fetch
def test_fetched_folder_is_checked_and_marked(hub: HubServer, published: Path, tmp_path: Path) -> None:
    """The files of the checkpoint and the mark; a second call asks the hub nothing."""
    commit = hub.add(ID, published)
    target = tmp_path / "models" / "tiny"
    output = fetch_model(f"{ID}@{commit}", target)
    assert str(target) in output
    whole = {"config.json", "preprocessor_config.json", "vocab.txt", "pytorch_model.bin", COMPLETE_FILE}
    assert {path.name for path in target.iterdir()} == whole
    assert all(path.stat().st_mode & 0o044 for path in target.iterdir()), "the worker is often another user"
    assert model_revision(target) == model_revision(published)
    hub.asked.clear()
    assert "complete already" in fetch_model(f"{ID}@{commit}", target)
    assert hub.asked == []


def test_mark_of_an_older_chart_is_used_after_a_check(hub: HubServer, published: Path, tmp_path: Path) -> None:
    """It held the revision alone, and stood also where no weights had come."""
    hub.add(ID, published)
    target = tmp_path / "m"
    shutil.copytree(published, target)
    (target / COMPLETE_FILE).write_text("main", encoding="utf-8")
    assert "complete already" in fetch_model(ID, target)
    (target / "pytorch_model.bin").unlink()
    assert "is complete: " in fetch_model(ID, target)
    assert "pytorch_model.bin" in hub.downloaded()


def test_another_revision_is_fetched_over_the_first(hub: HubServer, published: Path, tmp_path: Path) -> None:
    """The mark names the revision."""
    old = hub.add(ID, published)
    new = hub.add(ID, write_2022(tmp_path / "new", seed=5), ref="v2")
    target = tmp_path / "m"
    fetch_model(f"{ID}@{old}", target)
    first = model_revision(target)
    fetch_model(f"{ID}@v2", target)
    assert model_revision(target) == model_revision(hub.models[ID].commits[new]) != first


def test_revisions_are_not_mixed_in_one_folder(hub: HubServer, published: Path, tmp_path: Path) -> None:
    """What an earlier revision left does not stand in for what the next one lacks, and its mark goes first."""
    hub.add(ID, published)
    other = tmp_path / "other"
    shutil.copytree(published, other)
    (other / "vocab.txt").unlink()
    hub.add(ID, other, ref="v2")
    target = tmp_path / "m"
    fetch_model(ID, target)
    with pytest.raises(WrongCheckpoint, match="the tokenizer's vocabulary"):
        fetch_model(f"{ID}@v2", target)
    assert not (target / COMPLETE_FILE).exists()
    assert not (target / "vocab.txt").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "expected weights"),
        ("vocab.txt", "the tokenizer's vocabulary"),
        ("config.json", "config.json"),
    ],
)
def test_repository_without_a_file_is_not_marked(
    hub: HubServer, published: Path, tmp_path: Path, name: str, expected: str
) -> None:
    """A download that ends without an error is not yet a checkpoint."""
    (published / name).unlink()
    hub.add(ID, published)
    with pytest.raises(WrongCheckpoint, match=expected):
        fetch_model(ID, tmp_path / "m")
    assert not (tmp_path / "m" / COMPLETE_FILE).exists()


def test_fetch_is_refused_in_one_line(
    hub: HubServer, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, no model, an adapter, a hub that may not be asked, a place that cannot be written."""
    hub.add(ID, published)
    for model, got in ((None, "none"), (str(published), "'/"), ("./none", "'./none'")):
        with pytest.raises(FatalError, match=f"expected a hub id to download, got {got}") as caught:
            fetch_model(model, tmp_path / "m")
        assert caught.value.exit_code is ExitCode.CONFIG
    write_json(published / "adapter_config.json", {"base_model_name_or_path": ID, "peft_type": "LORA"})
    hub.add("me/adapter", published)
    with pytest.raises(WrongCheckpoint, match="merge both with --convert"):
        fetch_model("me/adapter", tmp_path / "m")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FatalError, match="cannot be written"):
        fetch_model(ID, tmp_path / "file" / "m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WrongCheckpoint, match="HF_HUB_OFFLINE forbids it; set it to 0"):
        fetch_model(ID, tmp_path / "other")


# ------------------------------------------------------------------------------------ convert
@pytest.mark.parametrize("kind", ["bin", "bin in parts", "old bin", "half", "safetensors", "safetensors in parts"])
def test_converted_checkpoint_gives_the_same_vectors(tmp_path: Path, kind: str) -> None:
    """Bit by bit, from weights of every kind, in their own number format."""
    make = write_2022 if "safetensors" not in kind else write_safetensors
    source = make(tmp_path / "source")
    if "parts" in kind:
        split_weights(source)
    if kind in {"old bin", "half"}:
        weights = weights_2022()
        dtype = torch.float16 if kind == "half" else torch.float32
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        weights["shared"] = weights["visual_projection.weight"]
        torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "half")
    (source / "README.md").write_bytes(b"about")
    target = tmp_path / "converted"
    output = convert_model(str(source), target)
    assert f"revision {model_revision(target)}" in output
    assert read_checkpoint(target).is_safetensors
    assert not list(target.glob("*.bin*"))
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}, "the worker is often another user"
    assert {"README.md", "config.json", "vocab.txt", "preprocessor_config.json"} <= {
        path.name for path in target.iterdir()
    }
    for before, after in zip(vectors(source), vectors(target), strict=True):
        np.testing.assert_array_equal(before, after)
    if kind == "half":
        with safe_open(target / "model.safetensors", "pt") as file:
            assert file.get_tensor("visual_projection.weight").dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_converted_adapter_needs_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is merged once, with the base's tokenizer and processor."""
    base = write_2022(tmp_path / "base")
    adapted(base, tmp_path / "adapter", target_modules=["value", "v_proj"])
    merged = vectors(tmp_path / "adapter")
    convert_model(str(tmp_path / "adapter"), tmp_path / "converted")
    monkeypatch.setattr(checkpoint_files, "find_spec", lambda _: None)
    for before, after in zip(merged, vectors(tmp_path / "converted"), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not np.array_equal(merged[0], vectors(base)[0])


def test_model_of_a_hub_is_converted(hub: HubServer, published: Path, tmp_path: Path) -> None:
    """It goes through the cache, and the result is a folder without links into it."""
    hub.add(ID, published)
    convert_model(ID, tmp_path / "converted")
    assert not any(path.is_symlink() for path in (tmp_path / "converted").iterdir())
    np.testing.assert_array_equal(vectors(published)[0], vectors(tmp_path / "converted")[0])


def test_failed_conversion_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the target nor a part of it; what is in the target already is never touched."""
    source = write_2022(tmp_path / "source")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_bytes(b"x")
    with pytest.raises(FatalError, match="expected a new or an empty folder"):
        convert_model(str(source), tmp_path / "used")
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(FatalError, match="expected the same weights"):
        convert_model(str(source), tmp_path / "target")
    monkeypatch.undo()

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_commands.shutil, "copyfile", no_room)
    with pytest.raises(FatalError, match=r"cannot be written.*No space left"):
        convert_model(str(source), tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "used"}
    assert os.listdir(tmp_path / "used") == ["mine"]
