"""A checkpoint that is incomplete, or asks for what the worker does not do, is refused by the file that is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shiwu_worker.checkpoints import checkpoint_files
from shiwu_worker.checkpoints.checkpoint_files import IncompleteCheckpoint, WrongCheckpoint, read_checkpoint
from shiwu_worker.errors import ExitCode
from shiwu_worker.stages.decode.image_spec import read_image_spec
from tests.support.checkpoints import (
    change_json,
    quiet_transformers,
    split_weights,
    write_2022,
    write_json,
    write_safetensors,
)

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 753177983\n"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each layout."""
    top = tmp_path_factory.mktemp("whole")
    with quiet_transformers():
        return {
            "bin": write_2022(top / "bin"),
            "safetensors": write_safetensors(top / "safetensors"),
            "bin in parts": split_weights(write_2022(top / "bins")),
            "safetensors in parts": split_weights(write_safetensors(top / "shards")),
        }


def test_texts_of_a_checkpoint_are_escaped_in_errors(tmp_path: Path) -> None:
    """A folder from elsewhere may have any file names; the error is printed on the operator's terminal."""
    (tmp_path / "\x1b[2J\u202egpj").touch()
    with pytest.raises(IncompleteCheckpoint) as caught:
        read_checkpoint(tmp_path)
    assert r"\u001b[2J\u202egpj" in str(caught.value)
    assert str(caught.value).isprintable()


def test_error_shows_no_password_of_a_url() -> None:
    """The hub's library quotes the URL of the mirror."""
    assert str(WrongCheckpoint("no https://user:hu/sh@mirror/api")) == "no https://mirror/api"


def put(name: str, content: bytes | str) -> Change:
    """Replace a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, keep: int) -> Change:
    """Leave only the first bytes of a file; a negative number counts from the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def without(name: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def setting(name: str, **changes: object) -> Change:
    """Change keys of a JSON file."""
    return lambda folder: change_json(folder / name, **changes)


def pipe(name: str) -> Change:
    """Put a pipe in the place of a file: opening it would wait forever."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def several(*changes: Change) -> Change:
    """One after the other."""
    return lambda folder: [change(folder) for change in changes]


CODE = {"auto_map": {"AutoModel": "modeling_mine.MyModel"}}
INDEX = "model.safetensors.index.json"
PART = "model-00002-of-00002.safetensors"
WRONG: list[tuple[str, str, Change, str, str]] = [
    # id, layout, change, the file that is named, a part of what is said
    ("no config", "bin", without("config.json"), "", "config.json, found preprocessor_config.json"),
    ("no weights", "bin", without("pytorch_model.bin"), "", "expected weights in model.safetensors"),
    ("no vocabulary", "bin", without("vocab.txt"), "", "the tokenizer's vocabulary"),
    (
        "settings of a tokenizer alone",
        "bin",
        several(without("vocab.txt"), put("tokenizer_config.json", "{}")),
        "",
        "the tokenizer's vocabulary",
    ),
    ("half of a vocabulary", "bin", several(without("vocab.txt"), put("vocab.json", "{}")), "", "with merges.txt"),
    ("empty vocabulary", "bin", put("vocab.txt", ""), "vocab.txt", "empty; download vocab.txt again"),
    ("empty config", "bin", put("config.json", ""), "config.json", "empty"),
    ("config that is no JSON", "bin", put("config.json", "{'a': 1}"), "config.json", "expected JSON"),
    ("config that is deep", "bin", put("config.json", "[" * 100_000), "config.json", "expected JSON"),
    ("config that is a list", "bin", put("config.json", "[]"), "config.json", "expected a JSON object, got list"),
    ("config in GBK", "bin", put("config.json", '{"名": 1}'.encode("gbk")), "config.json", "expected JSON"),
    ("processor that is no JSON", "bin", put("preprocessor_config.json", "<html>"), "preprocessor_config.json", "JSON"),
    ("no model type", "bin", setting("config.json", model_type=None), "config.json", "expected model_type"),
    *(
        (f"pointer of git-lfs for {name}", layout, put(name, LFS_POINTER), name, "run `git lfs pull`")
        for layout, name in [
            ("bin", "pytorch_model.bin"),
            ("bin", "vocab.txt"),
            ("bin", "config.json"),
            ("bin", "preprocessor_config.json"),
            ("safetensors", "model.safetensors"),
            ("safetensors in parts", INDEX),
            ("safetensors in parts", PART),
        ]
    ),
    ("cut bin", "bin", cut("pytorch_model.bin", -100), "pytorch_model.bin", "download pytorch_model.bin again"),
    ("bin of other bytes", "bin", put("pytorch_model.bin", "<html>"), "pytorch_model.bin", "torch.save"),
    ("bin that is a zip", "bin", put("pytorch_model.bin", b"PK\5\6" + bytes(18)), "pytorch_model.bin", "another zip"),
    ("empty bin", "bin", put("pytorch_model.bin", b""), "pytorch_model.bin", "empty"),
    ("cut safetensors", "safetensors", cut("model.safetensors", -1), "model.safetensors", "bytes, got"),
    ("cut header", "safetensors", cut("model.safetensors", 40), "model.safetensors", "expected safetensors"),
    ("seven bytes", "safetensors", cut("model.safetensors", 7), "model.safetensors", "expected safetensors"),
    ("web page", "safetensors", put("model.safetensors", "<html>" * 9), "model.safetensors", "expected safetensors"),
    (
        "header that is no JSON",
        "safetensors",
        put("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        "model.safetensors",
        "header of safetensors",
    ),
    ("pipe", "bin", pipe("pytorch_model.bin"), "pytorch_model.bin", "expected a file"),
    ("missing part", "safetensors in parts", without(PART), PART, "missing, although"),
    ("missing part of bin", "bin in parts", without("pytorch_model-00001-of-00002.bin"), "", "missing, although"),
    ("cut part", "safetensors in parts", cut(PART, -1), PART, "bytes, got"),
    ("index without a map", "safetensors in parts", put(INDEX, "{}"), INDEX, "expected weight_map"),
    *(
        (f"part called {name!r}", "safetensors in parts", setting(INDEX, weight_map={"a": name}), INDEX, "plain names")
        for name in [
            "../outside.safetensors",
            "/etc/passwd",
            "a/b.safetensors",
            "..\\b.safetensors",
            "..",
            "",
            7,
            "model.bin",
        ]
    ),
    ("code for the model", "bin", setting("config.json", **CODE), "config.json", "auto_map names Python code"),
    ("code for a part", "bin", setting("config.json", text_config=CODE), "config.json", "auto_map names Python code"),
    (
        "code for the tokenizer",
        "bin",
        put("tokenizer_config.json", '{"auto_map": ["tokenization_mine.Mine", null]}'),
        "tokenizer_config.json",
        "auto_map names Python code",
    ),
    (
        "code for the processor",
        "bin",
        setting("preprocessor_config.json", **CODE),
        "preprocessor_config.json",
        "auto_map names Python code",
    ),
    (
        "attention from a hub",
        "bin",
        setting("config.json", attn_implementation="kernels-community/flash-attn"),
        "config.json",
        "would load code from a hub",
    ),
    (
        "experts from a hub",
        "bin",
        setting("config.json", text_config={"_experts_implementation": "kernels-community/moe"}),
        "config.json",
        "would load code from a hub",
    ),
    *(
        (f"tokenizer with {key}", "bin", put("tokenizer_config.json", json.dumps({key: value})), "", said)
        for key, value, said in [
            ("init_inputs", ["/etc/passwd"], "init_inputs would name"),
            ("vocab_file", "/etc/passwd", "expected the name of a file in this folder"),
            ("merges_file", "../m/vocab.txt", "expected the name of a file in this folder"),
            (
                "fast_tokenizer_files",
                ["../m/vocab.txt", "tokenizer.json"],
                "expected the name of a file in this folder",
            ),
        ]
    ),
    (
        "quantized weights",
        "bin",
        setting("config.json", quantization_config={"quant_method": "mine"}),
        "config.json",
        "quantization_config (mine) is not supported",
    ),
    (
        "weights under another name",
        "safetensors",
        setting("config.json", transformers_weights="../x.safetensors"),
        "config.json",
        "transformers_weights is not supported",
    ),
    (
        "adapter beside full weights",
        "bin",
        put("adapter_config.json", "{}"),
        "",
        "got both pytorch_model.bin and adapter_config.json",
    ),
    (
        "weights of an adapter beside full weights",
        "safetensors",
        put("adapter_model.safetensors", b"x"),
        "",
        "got both model.safetensors and adapter_model.safetensors",
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=[case[0] for case in WRONG])
def test_wrong_checkpoint_error_names_the_file(
    whole: dict[str, Path], tmp_path: Path, case: tuple[str, str, Change, str, str]
) -> None:
    """One line that names the file, or the folder, and what to do; exit code 65."""
    _, layout, change, file, said = case
    folder = tmp_path / "m"
    shutil.copytree(whole[layout], folder)
    change(folder)
    with pytest.raises(WrongCheckpoint) as caught:
        read_image_spec(folder)
    text = str(caught.value)
    assert text.startswith(str(folder / file))
    assert said in text
    assert "\n" not in text
    assert caught.value.exit_code is ExitCode.MODEL


def test_whole_checkpoints_of_each_layout_are_read(whole: dict[str, Path]) -> None:
    """And the files that are loaded are those that count for the revision."""
    for layout, folder in whole.items():
        found = read_checkpoint(folder)
        assert found.is_safetensors == layout.startswith("safetensors")
        assert {path.name for path in found.files} == {path.name for path in folder.iterdir()}
        assert len(found.weights) == (2 if "parts" in layout else 1)


@pytest.mark.parametrize(
    "names",
    [
        ("tokenizer.json",),
        ("vocab.json", "merges.txt"),
        ("spiece.model",),
        ("sentencepiece.bpe.model",),
        ("tokenizer.model",),
    ],
    ids=lambda names: names[0],
)
def test_vocabularies_of_other_models_are_accepted(
    whole: dict[str, Path], tmp_path: Path, names: tuple[str, ...]
) -> None:
    """CLIP, SigLIP, AltCLIP and MetaCLIP have no vocab.txt."""
    folder = tmp_path / "m"
    shutil.copytree(whole["safetensors"], folder)
    (folder / "vocab.txt").unlink()
    for name in names:
        (folder / name).write_bytes(b"{}")
    assert {path.name for path in read_checkpoint(folder).tokenizer_files} == set(names)


def test_weights_of_torch_before_1_6_are_accepted(whole: dict[str, Path], tmp_path: Path) -> None:
    """They are no zip archive."""
    folder = tmp_path / "m"
    shutil.copytree(whole["bin"], folder)
    torch.save({}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    read_checkpoint(folder)


def test_adapter_without_peft_error_tells_how_to_install(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or how to do without."""
    folder = adapter_of(str(whole["bin"]), whole, tmp_path)
    monkeypatch.setattr(checkpoint_files, "find_spec", lambda _: None)
    with pytest.raises(WrongCheckpoint, match=r"pip install peft.*--convert"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "expected base_model_name_or_path"),
        ("", "expected base_model_name_or_path"),
        ("/no/such/base", "neither a folder here nor in the hub's cache"),
        ("no/such-base", "neither a folder here nor in the hub's cache"),
    ],
)
def test_adapter_with_a_base_that_is_not_here(whole: dict[str, Path], tmp_path: Path, base: str, said: str) -> None:
    """The path of the machine where it was trained is a frequent case."""
    with pytest.raises(WrongCheckpoint, match="adapter_config.json.*" + said):
        read_checkpoint(adapter_of(base, whole, tmp_path))


def test_adapter_takes_config_and_vocabulary_from_its_base(whole: dict[str, Path], tmp_path: Path) -> None:
    """A vocabulary of its own goes before the base's."""
    folder = adapter_of(str(whole["bin"]), whole, tmp_path)
    found = read_checkpoint(folder)
    assert (found.folder, found.base, found.tokenizer) == (folder, whole["bin"], whole["bin"])
    shutil.copyfile(whole["bin"] / "vocab.txt", folder / "vocab.txt")
    assert read_checkpoint(folder).tokenizer == folder
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"expected an adapter's adapter_config\.json and"):
        read_checkpoint(folder)


def test_adapter_that_names_a_module_is_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    """peft would import `megatron_core`."""
    folder = adapter_of(str(whole["bin"]), whole, tmp_path)
    change_json(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil.core")
    with pytest.raises(WrongCheckpoint, match=r"adapter_config\.json: megatron_config would import code"):
        read_checkpoint(folder)


@pytest.mark.parametrize("value", [None, "vocab.txt", "/home/trainer/cache/vocab.txt"])
def test_tokenizer_may_name_its_own_files(whole: dict[str, Path], tmp_path: Path, value: str | None) -> None:
    """Published tokenizers still name files of the machine that saved them."""
    folder = tmp_path / "bin"
    shutil.copytree(whole["bin"], folder)
    write_json(folder / "tokenizer_config.json", {"vocab_file": value, "special_tokens_map_file": value})
    assert read_checkpoint(folder).tokenizer == folder


def adapter_of(base: str | None, whole: dict[str, Path], tmp_path: Path) -> Path:
    """The folder of an adapter to this base; its weights only look like some."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": base, "peft_type": "LORA"})
    shutil.copyfile(whole["safetensors"] / "model.safetensors", folder / "adapter_model.safetensors")
    return folder
