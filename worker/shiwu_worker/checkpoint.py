"""A dual encoder of transformers on disk → its model and its texts' vectors. No device is chosen here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from shiwu_worker.label_checks import LabelTokens

TEXTS_AT_ONCE: Final = 128
RARE_LETTER: Final = "\U00010900"
"""A letter of Phoenician, which the vocabularies of dual encoders lack."""


def load_model(folder: Path) -> Any:
    """The model in FP32 on the CPU, for inference.

    Raises:
        ValueError: when it is no dual encoder, or weights are missing: transformers would make random ones up.
    """
    with _quiet():
        model, loading = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    if not (hasattr(model, "logit_scale") and hasattr(model, "get_image_features")):
        raise ValueError(f"{folder}: expected a dual encoder of pictures and texts, got {type(model).__name__}")
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{folder}: expected a whole checkpoint, got none of {len(missing)} weights: {missing[:3]}")
    return model.eval().requires_grad_(False)


def image_size(model: Any) -> int:
    """The side of the pictures that the model takes, in pixels."""
    size = model.config.vision_config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def unit_vectors(output: Any) -> torch.Tensor:
    """What `get_image_features` and `get_text_features` answer → unit vectors in FP32."""
    # transformers 5 answers an object whose pooler_output is projected; before it was the tensor itself.
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


class Texts:
    """Texts → unit vectors, by the checkpoint's own tokenizer. `model` lies on its device already."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        with _quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = model.config.text_config
        self._is_siglip = config.model_type.startswith("siglip")
        self._length = min(self._tokenizer.model_max_length, _text_length(config))
        self._empty_ids = self._find_empty_ids()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """m texts → float32 (m, d). Texts longer than the model's limit are cut, as the tokenizer does."""
        parts = [self._encode_some(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate(parts)

    def label_tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """What the tokenizer makes of each label, cut as `encode` cuts it."""
        all_ids = self._tokenize(labels, padding=False)["input_ids"] if labels else []
        return [LabelTokens(tuple(ids), is_readable=not self._empty_ids.issuperset(ids)) for ids in all_ids]

    def _encode_some(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # SigLIP was trained with full padding.
        padding = "max_length" if self._is_siglip else True
        tokens = self._tokenize(texts, padding=padding, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            vectors: NDArray[np.float32] = unit_vectors(self._model.get_text_features(**tokens)).cpu().numpy()
        return vectors

    def _find_empty_ids(self) -> set[int]:
        """Ids of tokens that tell the model nothing about a label."""
        # A tokenizer may not list its unknown token as special, so a rare letter shows it. SentencePiece writes the
        # space before a word as a token of its own.
        probed = self._tokenize([RARE_LETTER])["input_ids"][0]
        return {*self._tokenizer.all_special_ids, *probed, self._tokenizer.convert_tokens_to_ids("▁")}

    def _tokenize(self, texts: Sequence[str], **options: Any) -> Any:
        # SigLIP was trained with lower case.
        read = [text.lower() for text in texts] if self._is_siglip else list(texts)
        return self._tokenizer(read, truncation=True, max_length=self._length, **options)


def _text_length(config: Any) -> int:
    # RoBERTa's position numbers begin after the padding index, which takes two places away.
    places: int = config.max_position_embeddings
    return places - 2 if "roberta" in config.model_type or config.model_type.startswith("altclip") else places


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks, and with the process's own settings again afterwards."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
