"""A dual encoder of transformers on disk → its model and its texts' vectors. No device is chosen here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from shiwu_worker.checkpoints.checkpoint_files import Checkpoint, WrongCheckpoint, first_line
from shiwu_worker.jobs.label_checks import LabelTokens

log: Any = structlog.get_logger()
TEXTS_AT_ONCE: Final = 128
EMBEDDINGS_MULTIPLE: Final = 64
RARE_LETTER: Final = "\U00010900"
"""A letter of Phoenician, which the vocabularies of dual encoders lack."""


def load_model(checkpoint: Checkpoint) -> Any:
    """The model in FP32 on the CPU, for inference; an adapter is merged into it.

    Raises:
        WrongCheckpoint: when it is no dual encoder, its weights do not fit its configuration, or an adapter does not
            fit the model. transformers itself would make missing weights up at random.
    """
    with quiet_transformers():
        try:
            model, loading = AutoModel.from_pretrained(
                checkpoint.base,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=checkpoint.is_safetensors,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # border: three libraries read these files, each with errors of its own
            names = ", ".join(path.name for path in checkpoint.weights[:3])
            raise WrongCheckpoint(f"{checkpoint.base}: {names} cannot be loaded ({first_line(error)})") from error
    if not (hasattr(model, "logit_scale") and hasattr(model, "get_image_features")):
        text = f"expected a dual encoder of images and texts, got {type(model).__name__}"
        raise WrongCheckpoint(f"{checkpoint.config}: {text}")
    if missing := sorted(loading["missing_keys"]):
        text = f"expected all weights of {type(model).__name__}, got none of {len(missing)}: {', '.join(missing[:3])}"
        raise WrongCheckpoint(f"{checkpoint.base}: {text}")
    # Checkpoints of 2022 hold these numbers as weights, and models count them up by themselves.
    unused = sorted(key for key in loading["unexpected_keys"] if not key.endswith("position_ids"))
    if unused:
        log.warning("weights_unused", model=str(checkpoint.base), count=len(unused), first=unused[:3])
    if checkpoint.adapter:
        model = _merged(model, checkpoint)
    return model.eval().requires_grad_(False)


def _merged(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with a LoRA adapter merged into its weights, as peft itself does."""
    try:
        with warnings.catch_warnings():
            # What peft would warn of is an error here, and what it asks of transformers is not the operator's matter.
            warnings.simplefilter("ignore")
            return _merge(model, checkpoint)
    except WrongCheckpoint:
        raise
    except Exception as error:  # border: peft raises anything for an adapter that does not fit
        text = f"cannot be merged into {checkpoint.base} ({first_line(error)})"
        raise WrongCheckpoint(f"{checkpoint.adapter[1]}: {text}") from error


def _merge(model: Any, checkpoint: Checkpoint) -> Any:
    from peft import PeftConfig, PeftModel  # noqa: PLC0415 an extra that few need

    config_path, weights_path = checkpoint.adapter
    config = PeftConfig.from_pretrained(str(checkpoint.folder))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or getattr(config, "alora_invocation_tokens", None):
        raise WrongCheckpoint(
            f"{config_path}: expected a LoRA adapter, got {kind}; merge it where it was trained and name the folder"
        )
    config.inference_mode = True
    adapted = PeftModel(model, config)
    result = adapted.load_adapter(str(checkpoint.folder), "default", torch_device="cpu")
    if wrong := sorted([*result.missing_keys, *result.unexpected_keys]):
        raise WrongCheckpoint(
            f"{weights_path}: expected an adapter of {type(model).__name__} in {checkpoint.base}, got weights that do "
            f"not fit: {', '.join(wrong[:3])}"
        )
    return adapted.merge_and_unload(safe_merge=True)


def open_tokenizer(checkpoint: Checkpoint, *, vocab_size: int) -> Any:
    """The checkpoint's own tokenizer.

    Raises:
        WrongCheckpoint: it cannot be read, or its vocabulary is not the model's.
    """
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.tokenizer, config=_config(checkpoint), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # border: each tokenizer's library has errors of its own
            names = ", ".join(path.name for path in checkpoint.tokenizer_files)
            text = f"the tokenizer ({names}) cannot be read ({first_line(error)}); download these files again"
            raise WrongCheckpoint(f"{checkpoint.tokenizer}: {text}") from error
    found, base = len(tokenizer), int(tokenizer.vocab_size)
    # Embeddings are sometimes rounded up to a multiple of 64.
    is_padded = vocab_size % EMBEDDINGS_MULTIPLE == 0 and vocab_size - found < EMBEDDINGS_MULTIPLE
    if (found < vocab_size and not is_padded) or base > vocab_size:
        names = ", ".join(path.name for path in checkpoint.tokenizer_files)
        raise WrongCheckpoint(
            f"{checkpoint.tokenizer}: expected the vocabulary of {vocab_size} tokens that the model has, got {found} "
            f"from {names}; files are missing, cut off or another model's, so download them again"
        )
    return tokenizer


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """How many tokens the model's text tower knows, by its configuration."""
    return int(_config(checkpoint).text_config.vocab_size)


def _config(checkpoint: Checkpoint) -> Any:
    return AutoConfig.from_pretrained(checkpoint.base, local_files_only=True, trust_remote_code=False)


def image_size(model: Any) -> int:
    """The side of the pictures that the model takes, in pixels."""
    size = model.config.vision_config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def unit_vectors(output: Any) -> torch.Tensor:
    """What `get_image_features` and `get_text_features` answer → unit vectors in FP32."""
    # transformers 5 answers an object whose pooler_output is projected; before it was the tensor itself.
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


class TextEncoder:
    """Texts → unit vectors, by the checkpoint's own tokenizer. `model` lies on its device already."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model = model
        self._tokenizer = open_tokenizer(checkpoint, vocab_size=model.config.text_config.vocab_size)
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
    placements: int = config.max_position_embeddings
    return placements - 2 if "roberta" in config.model_type or config.model_type.startswith("altclip") else placements


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
