"""A checkpoint on disk → its model and its texts: as transformers' own, or refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from structlog.testing import capture_logs
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)

from shiwu_worker.checkpoints.checkpoint_files import WrongCheckpoint, read_checkpoint
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.checkpoint import open_tokenizer, vocabulary_size
from tests.support.adapters import adapted, load
from tests.support.checkpoints import (
    SIDE,
    VOCABULARY,
    change_json,
    make_model,
    weights_2022,
    write_2022,
    write_json,
    write_safetensors,
)
from tests.support.siglip2 import write_siglip2

TEXTS = ["熊猫", "一张猫的照片", "动物 人物", "Cat", "猫狗鸟车" * 20, "ｘ"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
TEXT = {key: VISION[key] for key in list(VISION)[:4]} | {"max_position_embeddings": 12}


# peft still asks for attributes that transformers will drop; transformers 5.5 for a way of tokenizers to read a file.
pytestmark = [
    pytest.mark.usefixtures("silent_transformers"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The layout of December 2022."""
    return write_2022(tmp_path / "m")


# ------------------------------------------------------------------------------------ weights
def test_weights_of_2022_are_loaded(folder: Path) -> None:
    """Every weight, bit by bit, and no word about the buffers of that time."""
    with capture_logs() as logs:
        model, _ = load(folder)
    for name, value in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert logs == []


def test_unused_weights_are_logged(folder: Path) -> None:
    """A checkpoint may hold more than the model has; the operator is told."""
    torch.save(weights_2022() | {"head.weight": torch.zeros(3)}, folder / "pytorch_model.bin")
    with capture_logs() as logs:
        load(folder)
    assert [(one["event"], one["count"], one["first"]) for one in logs] == [("weights_unused", 1, ["head.weight"])]


def test_pickled_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    """pytorch_model.bin is a pickle, which could name any function; only tensors are read from it."""

    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was run"),)

    torch.save(weights_2022() | {"code": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(WrongCheckpoint, match=r"pytorch_model\.bin cannot be loaded"):
        load(folder)
    assert not (tmp_path / "was run").exists()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(WrongCheckpoint, match=r"pytorch_model\.bin"):
        load(folder)
    assert not (tmp_path / "was run").exists()


def test_cut_weights_of_old_torch_are_rejected(folder: Path) -> None:
    """Their length cannot be told without reading them."""
    path = folder / "pytorch_model.bin"
    torch.save(weights_2022(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(WrongCheckpoint, match=r"pytorch_model\.bin cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_rejected(folder: Path) -> None:
    """One sentence, not transformers' table."""
    torch.save(weights_2022() | {"visual_projection.weight": torch.zeros(5, 5)}, folder / "pytorch_model.bin")
    with pytest.raises(WrongCheckpoint, match=r"pytorch_model\.bin cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ tokenizers
def clip(folder: Path) -> Path:
    """OpenAI's layout: vocab.json and merges.txt."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    CLIPModel(
        CLIPConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": len(words), "eos_token_id": 55})
    ).save_pretrained(folder)
    write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", encoding="utf-8")
    return folder


def siglip(folder: Path) -> Path:
    """Google's layout: spiece.model and the settings of its tokenizer."""
    folder.mkdir()
    corpus = ["a cat on a mat", "the dog and a panda", "a photo of a building", "猫 狗 熊猫 动物 照片"] * 30
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            vocab_size=32,
            pad_id=-1,
            bos_id=-1,
            eos_id=1,
            unk_id=2,
            minloglevel=2,
        )
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "model_max_length": 12}
    write_json(folder / "tokenizer_config.json", settings)
    text = TEXT | {"vocab_size": 32, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "tokenizer"),
    [
        (write_2022, BertTokenizer),
        (clip, CLIPTokenizer),
        (siglip, SiglipTokenizer),
        (write_siglip2, GemmaTokenizer),
    ],
    ids=["chinese-clip", "clip", "siglip", "siglip-2"],
)
def test_texts_are_read_as_transformers_reads_them(tmp_path: Path, make: Any, tokenizer: Any) -> None:
    """By the tokenizer of each layout; SigLIP in lower case."""
    model, texts = load(make(tmp_path / "own"))
    theirs = tokenizer.from_pretrained(tmp_path / "own")
    length = min(theirs.model_max_length, model.config.text_config.max_position_embeddings)
    expected = [theirs(text, truncation=True, max_length=length)["input_ids"] for text in TEXTS]
    if make in {siglip, write_siglip2}:
        expected[3] = theirs("cat", truncation=True, max_length=length)["input_ids"]
    assert [list(one.ids) for one in texts.label_tokens(TEXTS)] == expected
    assert np.isfinite(texts.encode(TEXTS)).all()


@pytest.mark.parametrize(
    ("words", "is_whole"),
    [
        (VOCABULARY[:-1], False),
        ((*VOCABULARY[:60], "[UNK]", "[CLS]", "[SEP]", "[MASK]"), False),
        ((*VOCABULARY, "x"), False),
        (VOCABULARY, True),
    ],
    ids=["one line less", "cut", "another model's", "whole"],
)
def test_vocabulary_must_have_the_size_of_the_model(folder: Path, words: tuple[str, ...], is_whole: bool) -> None:
    """With a smaller one labels become unknown; with a larger one they have no embedding."""
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    checkpoint = read_checkpoint(folder)
    size = vocabulary_size(checkpoint)
    if is_whole:
        assert len(open_tokenizer(checkpoint, vocab_size=size)) == size
        return
    with pytest.raises(WrongCheckpoint, match=rf"vocabulary of {size} tokens that the model has, got {len(words)}"):
        open_tokenizer(checkpoint, vocab_size=size)


def test_embeddings_may_be_rounded_up(folder: Path) -> None:
    """To a multiple of 64, as for a GPU; not by more."""
    checkpoint = read_checkpoint(folder)
    rounded = -(-len(VOCABULARY) // 64) * 64
    open_tokenizer(checkpoint, vocab_size=rounded)
    for size in (rounded + 64, len(VOCABULARY) + 3):
        with pytest.raises(WrongCheckpoint, match="vocabulary"):
            open_tokenizer(checkpoint, vocab_size=size)


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{}"), ("tokenizer_config.json", '{"tokenizer_class": 7}'), ("vocab.txt", "[UNK]\udcff")],
)
def test_unreadable_tokenizer_is_rejected(folder: Path, file: str, content: str) -> None:
    """Its files are named, in one line."""
    (folder / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(WrongCheckpoint, match=rf"the tokenizer \(.*{file}.*\) cannot be read") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ adapters
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["query", "value", "q_proj", "v_proj"]},
    "DoRA": {"target_modules": ["query", "value", "fc1"], "use_dora": True},
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True},
    "with a whole module": {"target_modules": ["value"], "modules_to_save": ["visual_projection"]},
}


@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
def test_adapter_is_merged_as_peft_does(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Images and texts get the vectors of peft's own unmerged model, which differ from the base's."""
    theirs = adapted(folder, tmp_path / "adapter", **options)
    ours, _ = load(tmp_path / "adapter")
    assert not any(isinstance(module, LoraLayer | LoraModel | PeftModel) for module in ours.modules())
    base, _ = load(folder)
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[101, 104, 105, 102]])
    with torch.inference_mode():
        for call in ("get_image_features", "get_text_features"):
            given = {"pixel_values": pixels} if "image" in call else {"input_ids": ids}
            mine, expected, plain = (
                getattr(one, call)(**given).pooler_output for one in (ours, theirs.base_model.model, base)
            )
            assert torch.cosine_similarity(mine, expected).min() > 1 - 1e-6
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
            if "image" in call or "query" in str(options):
                assert (mine - plain).abs().max() > 0.01


def test_adapter_of_another_model_is_rejected(folder: Path, tmp_path: Path) -> None:
    """peft itself warns, or passes over weights that have no place."""
    adapted(folder, tmp_path / "adapter", target_modules=["query", "q_proj"])
    change_json(tmp_path / "adapter" / "adapter_config.json", target_modules=["query"])
    with pytest.raises(WrongCheckpoint, match=r"adapter_model\.safetensors: .*do not fit"):
        load(tmp_path / "adapter")
    change_json(tmp_path / "adapter" / "adapter_config.json", target_modules=["query", "q_proj", "v_proj"])
    with pytest.raises(WrongCheckpoint, match=r"adapter_model\.safetensors: .*do not fit"):
        load(tmp_path / "adapter")
    change_json(tmp_path / "adapter" / "adapter_config.json", target_modules=["nothing"])
    with pytest.raises(WrongCheckpoint, match=r"adapter_model\.safetensors: cannot be merged") as caught:
        load(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_adapter_of_another_kind_is_rejected(folder: Path, tmp_path: Path) -> None:
    """Only LoRA is merged."""
    adapted(folder, tmp_path / "adapter", target_modules=["query"])
    write_json(
        tmp_path / "adapter" / "adapter_config.json",
        {
            "base_model_name_or_path": str(folder),
            "peft_type": "IA3",
            "target_modules": ["query"],
            "feedforward_modules": [],
        },
    )
    with pytest.raises(WrongCheckpoint, match=r"adapter_config\.json: expected a LoRA adapter, got IA3"):
        load(tmp_path / "adapter")


# ------------------------------------------------------------------------------------ the whole encoder
def test_encoder_rejects_image_sizes_that_do_not_fit(folder: Path) -> None:
    """The processor of another model beside these weights."""
    change_json(folder / "preprocessor_config.json", size={"height": 64, "width": 64})
    with pytest.raises(
        WrongCheckpoint, match=rf"images of {SIDE}×{SIDE}, and the image processor makes 64×64"
    ) as caught:
        load_encoder(Settings(model=str(folder), device="cpu", max_batch=1), folder, read_image_spec(folder))
    assert caught.value.exit_code is ExitCode.MODEL


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_encoder_follows_the_image_processor(tmp_path: Path, change: dict[str, Any]) -> None:
    """Vectors are those of transformers' processor and model, and others than those of the usual settings."""
    folder = write_safetensors(tmp_path / "m")
    change_json(folder / "preprocessor_config.json", **change)
    spec = read_image_spec(folder)
    encoder = load_encoder(Settings(model=str(folder), device="cpu", dtype="float32", max_batch=1), folder, spec)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    vectors = []
    for settings in (config, {**config, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}):
        pixels = CLIPImageProcessorPil.from_dict(settings)(images=image, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            vectors.append(make_model().get_image_features(pixel_values=pixels.float()).pooler_output[0])
    ours = torch.from_numpy(encoder.encode(image[None])[0])
    assert torch.cosine_similarity(ours, vectors[0], dim=0) > 1 - 1e-5
    assert torch.cosine_similarity(ours, vectors[1], dim=0) < 0.99


def test_fixture_has_the_published_layout(tmp_path: Path) -> None:
    """Four files, and the processor's file as large as the published one: 342 bytes."""
    folder = write_2022(tmp_path / "m")
    names = {"config.json", "preprocessor_config.json", "vocab.txt", "pytorch_model.bin"}
    assert {path.name for path in folder.iterdir()} == names
    published = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    published["size"] = {"height": 224, "width": 224}
    write_json(folder / "preprocessor_config.json", published)
    assert (folder / "preprocessor_config.json").stat().st_size == 342
