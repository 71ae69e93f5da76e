"""Tiny dual encoders with random weights, in the layouts of published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions

SIDE = 16
PLACES = 12  # the texts' length limit of the tiny checkpoints
SCALE, BIAS = 100.0, -12.93  # what published CLIP and SigLIP checkpoints carry; neither is exact in bfloat16
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 35,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": PLACES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(kind: str) -> Any:
    """A tiny model with random weights and a published checkpoint's scale."""
    torch.manual_seed(7)
    model: Any
    if kind == "clip":
        model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8))
    elif kind == "metaclip_2":
        model = MetaClip2Model(MetaClip2Config(vision_config=VISION, text_config=TEXT, projection_dim=8))
    elif kind == "altclip":
        # RoBERTa's positions begin after the padding index.
        text = {**TEXT, "max_position_embeddings": PLACES + 2, "project_dim": 8}
        model = AltCLIPModel(AltCLIPConfig(vision_config=VISION, text_config=text, projection_dim=8))
    elif kind == "chinese_clip":
        model = ChineseCLIPModel(ChineseCLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8))
    else:
        model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
        model.logit_bias.data.fill_(BIAS)
    model.logit_scale.data.fill_(math.log(SCALE))
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    """The folder, with the model and a tokenizer in it."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_encoder(
    folder: Path,
    *,
    dtype: str = "float32",
    batch_sizes: tuple[int, ...] = (1, 2, 4),
    mean: float = 0.5,
    std: float = 0.5,
    is_compiled: bool = False,
    threads: int | None = None,
    known_images: NDArray[np.uint8] | None = None,
    fusions: Sequence[str] | None = None,
) -> Encoder:
    """The encoder over this folder, on the CPU."""
    options = EncoderOptions(
        folder=folder,
        model_id="tiny",
        revision="r",
        device="cpu",
        dtype=dtype,
        batch_sizes=batch_sizes,
        mean=(mean,) * 3,
        std=(std,) * 3,
        threads=threads,
        is_compiled=is_compiled,
        known_images=known_images,
        fusions=fusions,
    )
    return Encoder(options)


def noise(count: int, side: int = SIDE) -> NDArray[np.uint8]:
    """Random pictures."""
    return np.random.default_rng(5).integers(0, 256, (count, side, side, 3), np.uint8)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters that knows upper and lower case apart."""
    signs = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *"ABC", *"猫狗"]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
