"""A tiny SigLIP 2 in a fixed size: transformers' SiglipModel with a tokenizer of Gemma's kind and number of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from tests.support import encoders
from tests.support.checkpoints import quiet_transformers

VOCABULARY: Final = 256_000
SPECIAL: Final = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
PIECES: Final = (*"▁abcdefghijklmnopqrstuvwxyz", *"猫狗熊一张的照片", "ca", "cat", "熊猫")
MERGES: Final = [("c", "a"), ("ca", "t"), ("熊", "猫")]
SETTINGS: Final = {
    "tokenizer_class": "GemmaTokenizer",
    "processor_class": "SiglipProcessor",
    "add_bos_token": False,
    "add_eos_token": True,
    "do_lower_case": True,
    "model_input_names": ["input_ids"],
    "model_max_length": 10**30,
    "padding_side": "right",
    **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")},
}
"""As in the published tokenizer_config.json: no mask, and no limit of its own."""


def write_siglip2(folder: Path) -> Path:
    """The folder, of 24 MB because of its vocabulary."""
    folder.mkdir()
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    known = [*SPECIAL, *bytes_, *PIECES]
    words = [*known, *(f"<unused{number}>" for number in range(VOCABULARY - len(known)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    torch.manual_seed(7)
    text = {**encoders.TEXT, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    with quiet_transformers():
        model = SiglipModel(SiglipConfig(vision_config=encoders.VISION, text_config=text))
        model.logit_scale.data.fill_(math.log(encoders.SCALE))
        model.logit_bias.data.fill_(encoders.BIAS)
        model.save_pretrained(folder)
        SiglipImageProcessorPil(size={"height": encoders.SIDE, "width": encoders.SIDE}).save_pretrained(folder)
    return folder
