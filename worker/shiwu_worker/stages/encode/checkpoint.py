"""Loads a dual encoder of transformers from disk: its model, its tokenizer and its text vectors. Chooses no device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from structlog.typing import FilteringBoundLogger
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from shiwu.broker.chunks import chunks
from shiwu_worker.checkpoints.checkpoint_files import Checkpoint, WrongCheckpoint, first_line
from shiwu_worker.jobs.label_checks import LabelTokens

log: FilteringBoundLogger = structlog.get_logger()
MAX_TEXTS_PER_BATCH: Final = 128
EMBEDDINGS_MULTIPLE: Final = 64
RARE_LETTER: Final = "\U00010900"
"""A Phoenician letter, which no vocabulary of a dual encoder contains."""


def load_model(checkpoint: Checkpoint) -> Any:
    """The model in FP32 on the CPU, for inference; an adapter is merged into it.

    Raises:
        WrongCheckpoint: when it is no dual encoder, its weights do not fit its configuration, or an adapter does not
            fit the model. transformers itself would fill missing weights at random.
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
        except Exception as error:  # border: three libraries read these files, and each raises its own errors
            names = ", ".join(path.name for path in checkpoint.weights[:3])
            raise WrongCheckpoint(f"{checkpoint.base}: {names} cannot be loaded ({first_line(error)})") from error
    if not (hasattr(model, "logit_scale") and hasattr(model, "get_image_features")):
        text = f"expected a dual encoder of images and texts, got {type(model).__name__}"
        raise WrongCheckpoint(f"{checkpoint.config}: {text}")
    if missing := sorted(loading["missing_keys"]):
        text = f"expected all weights of {type(model).__name__}, got none of {len(missing)}: {', '.join(missing[:3])}"
        raise WrongCheckpoint(f"{checkpoint.base}: {text}")
    # Checkpoints of 2022 store position ids as weights; models compute them.
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
            # What peft warns of is an error here, and its deprecation warnings are of no use to the operator.
            warnings.simplefilter("ignore")
            return _merge(model, checkpoint)
    except WrongCheckpoint:
        raise
    except Exception as error:  # border: peft raises many kinds of errors for an adapter that does not fit
        text = f"cannot be merged into {checkpoint.base} ({first_line(error)})"
        raise WrongCheckpoint(f"{checkpoint.adapter[1]}: {text}") from error


def _merge(model: Any, checkpoint: Checkpoint) -> Any:
    from peft import PeftConfig, PeftModel  # noqa: PLC0415 an optional dependency

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
        WrongCheckpoint: when it cannot be read, or its vocabulary is not the model's.
    """
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.tokenizer, config=_config(checkpoint), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # border: each tokenizer library raises its own errors
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
    """The number of tokens of the model's text tower, from its configuration."""
    return int(_config(checkpoint).text_config.vocab_size)


def _config(checkpoint: Checkpoint) -> Any:
    return AutoConfig.from_pretrained(checkpoint.base, local_files_only=True, trust_remote_code=False)


def image_size(model: Any) -> int:
    """The side of the square images that the model takes, in pixels."""
    size = model.config.vision_config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


class ScoreHead(NamedTuple):
    """What the model was trained to do with a cosine: scale · cosine + bias."""

    scale: float
    bias: float | None
    """None for models that are trained with softmax."""


def score_head(model: Any) -> ScoreHead:
    """The head of a model in FP32."""
    bias = getattr(model, "logit_bias", None)
    return ScoreHead(math.exp(float(model.logit_scale)), None if bias is None else float(bias))


def unit_vectors(output: Any) -> torch.Tensor:
    """Turns what `get_image_features` and `get_text_features` return into unit vectors in FP32."""
    # transformers 5 returns an object whose pooler_output is projected; older versions return the tensor itself.
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


class TextEncoder:
    """Texts → unit vectors, with the checkpoint's own tokenizer. `model` is already on its device."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model = model
        self._tokenizer = open_tokenizer(checkpoint, vocab_size=model.config.text_config.vocab_size)
        config = model.config.text_config
        self._is_siglip = config.model_type.startswith("siglip")
        self.max_tokens = int(min(self._tokenizer.model_max_length, _text_length(config)))
        """Longest text in tokens; longer ones are cut."""
        self._empty_ids = self._find_empty_ids()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """m texts → float32 (m, d). The tokenizer cuts texts to the model's limit."""
        return np.concatenate([self._encode_batch(part) for part in chunks(texts, MAX_TEXTS_PER_BATCH)])

    def label_tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """The tokens of each label, cut as `encode` cuts it."""
        all_ids = self._tokenize(labels, padding=False)["input_ids"] if labels else []
        return [LabelTokens(tuple(ids), is_readable=not self._empty_ids.issuperset(ids)) for ids in all_ids]

    def _encode_batch(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # SigLIP was trained with full padding.
        padding = "max_length" if self._is_siglip else True
        tokens = self._tokenize(texts, padding=padding, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            vectors: NDArray[np.float32] = unit_vectors(self._model.get_text_features(**tokens)).cpu().numpy()
        return vectors

    def _find_empty_ids(self) -> set[int]:
        """Ids of tokens that carry no information about a label."""
        # A tokenizer may not list its unknown token as special, so a rare letter shows it. SentencePiece writes the
        # space before a word as a separate token.
        probed = self._tokenize([RARE_LETTER])["input_ids"][0]
        return {*self._tokenizer.all_special_ids, *probed, self._tokenizer.convert_tokens_to_ids("▁")}

    def _tokenize(self, texts: Sequence[str], **options: Any) -> Any:
        # SigLIP was trained with lower case.
        read = [text.lower() for text in texts] if self._is_siglip else list(texts)
        return self._tokenizer(read, truncation=True, max_length=self.max_tokens, **options)


def _text_length(config: Any) -> int:
    # RoBERTa's position numbers begin after the padding index, which leaves two positions fewer.
    positions: int = config.max_position_embeddings
    return positions - 2 if "roberta" in config.model_type or config.model_type.startswith("altclip") else positions


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switches off the progress bars and log messages of transformers; restores the settings afterwards."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
