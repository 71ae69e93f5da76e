"""Batch → unit vectors, with any dual encoder of transformers.

Batches have a few fixed sizes ("rungs"), padded up: each is warmed before the worker is ready, and in a fixed shape a
picture gets the same vector whatever its neighbours are. After the projection everything is FP32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from shiwu.contract import Head, ModelInfo
from shiwu_worker.errors import NonFiniteError, Trouble

TEXTS_AT_ONCE: Final = 128
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(asked: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if asked == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(asked)


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA, bfloat16 on CPUs that compute in it, else float32.

    float16 on a CPU is several times slower than float32.
    """
    if asked != "auto":
        return _DTYPES[asked]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags


class Encoder:
    """A loaded model. Not thread-safe: one thread encodes.

    Args:
        folder: the checkpoint, in transformers' format.
        rungs: batch sizes, ascending; the last is the largest batch.
        mean, std: of the checkpoint's processor, for pixels of 0 to 1.
        threads: of torch on a CPU; None leaves torch's own choice.
    """

    def __init__(
        self,
        *,
        folder: Path,
        model_id: str,
        revision: str,
        device: str = "auto",
        dtype: str = "auto",
        rungs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        mean: Sequence[float],
        std: Sequence[float],
        threads: int | None = None,
    ) -> None:
        self._device = choose_device(device)
        self._dtype = choose_dtype(dtype, self._device)
        if threads and self._device.type == "cpu":
            torch.set_num_threads(threads)
        model = _load(folder).eval().requires_grad_(False)
        # Before the cast: in bfloat16 a scale of 100 would be 98.9.
        self.scale = math.exp(float(model.logit_scale))
        bias = getattr(model, "logit_bias", None)
        self.bias = None if bias is None else float(bias)
        self.default_head: Head = "softmax" if bias is None else "sigmoid"
        self._model = model.to(device=self._device, dtype=self._dtype)
        self._exact: Any = None
        self._folder = folder
        self._tokenizer = _load_tokenizer(folder)
        self.rungs = tuple(rungs)
        # (x / 255 - mean) / std as one multiplication and one addition, in FP32.
        self._gain = torch.tensor([1 / (255 * s) for s in std], device=self._device).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=self._device).view(
            1, 3, 1, 1
        )
        self.info = ModelInfo(
            id=model_id,
            revision=revision,
            dtype=str(self._dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
        )
        self.slowest_s = 0.0
        """The longest forward pass of the warm-up."""
        size = _image_size(self._model.config)
        self._shape = (size, size, 3)
        self._staging = torch.zeros(
            (self.rungs[-1], *self._shape), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        self._staged: NDArray[np.uint8] = self._staging.numpy()

    def warm(self) -> None:
        """Run every rung once, largest first, so that no job pays for first calls.

        Raises:
            NonFiniteError: when this dtype overflows on this model.
        """
        for rung in reversed(self.rungs):
            began_s = time.monotonic()
            self.encode(np.full((rung, *self._shape), 127, np.uint8))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures uint8 (n, h, w, 3) → unit vectors float32 (n, d).

        Raises:
            ValueError: for a wrong shape or more pictures than the largest rung.
            NonFiniteError: names the rows that are not finite.
        """
        count = len(pixels)
        if pixels.shape[1:] != self._shape or pixels.dtype != np.uint8 or not 0 < count <= self.rungs[-1]:
            expected = f"uint8 (1 to {self.rungs[-1]}, {', '.join(map(str, self._shape))})"
            raise ValueError(f"expected {expected}, got {pixels.dtype} {pixels.shape}")
        rung = next(size for size in self.rungs if size >= count)
        self._staged[:count] = pixels
        self._staged[count:rung] = 0
        return _finite(self._run(self._model, self._staging[:rung], self._dtype)[:count])

    def encode_exact(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same in FP32, whatever dtype is in use: for pictures that overflow a smaller one.

        The first call loads the checkpoint again; its weights then stay on the device beside the others.
        """
        if self._exact is None:
            is_exact = self._dtype is torch.float32
            self._exact = self._model if is_exact else _load(self._folder).eval().requires_grad_(False).to(self._device)
        return _finite(self._run(self._exact, torch.from_numpy(np.ascontiguousarray(pixels)), torch.float32))

    def _run(self, model: Any, pixels: torch.Tensor, dtype: torch.dtype) -> NDArray[np.float32]:
        with torch.inference_mode():
            raw = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            ready = (raw.float() * self._gain + self._shift).to(dtype)
            vectors: NDArray[np.float32] = _unit(_pooled(model.get_image_features(pixel_values=ready))).cpu().numpy()
        return vectors

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """m texts → unit vectors float32 (m, d). Texts longer than the model's limit are cut, as the tokenizer does."""
        parts = [self._encode_some(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate(parts)

    def _encode_some(self, texts: Sequence[str]) -> NDArray[np.float32]:
        config = self._model.config.text_config
        fixed = config.model_type.startswith("siglip")  # SigLIP was trained with lower case and full padding
        length = min(self._tokenizer.model_max_length, _text_length(config))
        tokens = self._tokenizer(
            [text.lower() for text in texts] if fixed else list(texts),
            padding="max_length" if fixed else True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            return _finite(_unit(_pooled(self._model.get_text_features(**tokens))).cpu().numpy())

    def trouble(self, error: BaseException) -> Trouble:
        """What an error of `encode` means for its batch."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # nothing happens where CUDA is not in use
            return Trouble.OUT_OF_MEMORY
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            return Trouble.OUT_OF_MEMORY
        is_lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
        return Trouble.LOST if is_lost else Trouble.OTHER


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


def _load(folder: Path) -> Any:
    """The model in FP32.

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
    return model


def _load_tokenizer(folder: Path) -> Any:
    with _quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _image_size(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def _text_length(config: Any) -> int:
    # RoBERTa's position numbers begin after the padding index, which takes two places away.
    places: int = config.max_position_embeddings
    return places - 2 if "roberta" in config.model_type or config.model_type.startswith("altclip") else places


def _pooled(output: Any) -> torch.Tensor:
    # transformers 5 answers an object whose pooler_output is projected; before it was the tensor itself.
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return tensor.float()


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _finite(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        rows = tuple(bad.tolist())
        raise NonFiniteError(f"expected finite vectors, got NaN or infinity in rows {list(rows)[:20]}", rows)
    return vectors
