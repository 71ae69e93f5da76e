"""Tiny checkpoints with random weights, in the layouts that published models have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel
from transformers.utils import logging as transformers_logging

SIDE: Final = 32
PLACES: Final = 24
"""Length limit of the texts."""
SCALE: Final = 100.0
WORDS: Final = tuple(dict.fromkeys("动物人交通工具食建筑植熊猫狗鸟车花草照片一张的"))
VOCABULARY: Final = ("[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
MEAN: Final = [0.48145466, 0.4578275, 0.40821073]
STD: Final = [0.26862954, 0.26130258, 0.27577711]
COMMON_2022: Final = {
    "add_cross_attention": False,
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "do_sample": False,
    "is_decoder": False,
    "max_length": 20,
    "num_beams": 1,
    "return_dict": True,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "torch_dtype": None,
    "transformers_version": "4.24.0.dev0",
    "use_bfloat16": False,
}
"""What transformers wrote into each part of a configuration in 2022, in part."""
CONFIG_2022: Final[Mapping[str, Any]] = {
    "architectures": ["ChineseCLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "chinese_clip",
    "projection_dim": 8,
    "text_config": {
        **COMMON_2022,
        "architectures": ["ChineseCLIPTextModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "directionality": "bidi",
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": PLACES,
        "model_type": "chinese_clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "output_past": True,
        "pad_token_id": 0,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": len(VOCABULARY),
    },
    "text_config_dict": None,
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        **COMMON_2022,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "image_size": SIDE,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-05,
        "model_type": "chinese_clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 1,
        "patch_size": 8,
        "projection_dim": 8,
    },
    "vision_config_dict": None,
}
PROCESSOR_2022: Final[Mapping[str, Any]] = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ChineseCLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": {"height": SIDE, "width": SIDE},
}


def write_2022(folder: Path, *, seed: int = 0) -> Path:
    """The four files that the main branch of OFA-Sys/chinese-clip-vit-base-patch16 has since December 2022.

    config.json, preprocessor_config.json without `image_processor_type`, vocab.txt, and pytorch_model.bin with the
    buffers that transformers counted among the weights then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG_2022)
    write_json(folder / "preprocessor_config.json", PROCESSOR_2022)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    torch.save(weights_2022(seed=seed), folder / "pytorch_model.bin")
    return folder


def write_safetensors(folder: Path, *, seed: int = 0) -> Path:
    """The same model with model.safetensors in place of pytorch_model.bin."""
    write_2022(folder, seed=seed)
    (folder / "pytorch_model.bin").unlink()
    save_file(make_model(seed=seed).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def make_model(*, seed: int = 0) -> Any:
    """A tiny Chinese-CLIP with random weights and a published checkpoint's scale."""
    torch.manual_seed(seed)
    text, vision = (
        {key: CONFIG_2022[part][key] for key in CONFIG_2022[part] if key not in COMMON_2022}
        for part in ("text_config", "vision_config")
    )
    model: Any = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.logit_scale.data.fill_(math.log(SCALE))
    for weight in model.text_model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(10)  # with the usual small ones all short texts have the same vector in bfloat16
    return model.eval()


def weights_2022(*, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model's weights under the names that pytorch_model.bin has."""
    weights = dict(make_model(seed=seed).state_dict())
    patches = (SIDE // 8) ** 2
    weights["text_model.embeddings.position_ids"] = torch.arange(PLACES)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(patches + 1)[None]
    return weights


def split_weights(folder: Path, *, parts: int = 2) -> Path:
    """Put the weights of a folder into several files with an index, of the same kind."""
    whole = folder / "model.safetensors"
    is_safe = whole.exists()
    weights = dict(make_model().state_dict()) if is_safe else weights_2022()
    (whole if is_safe else folder / "pytorch_model.bin").unlink()
    stem, suffix = ("model", "safetensors") if is_safe else ("pytorch_model", "bin")
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05}-of-{parts:05}.{suffix}"
        mine = {name: weights[name] for name in names[part::parts]}
        weight_map |= dict.fromkeys(mine, file)
        if is_safe:
            save_file(mine, folder / file, {"format": "pt"})
        else:
            torch.save(mine, folder / file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file as transformers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars and remarks of transformers, which the tests' strict warnings and output do not expect."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
