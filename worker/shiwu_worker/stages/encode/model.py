"""The model on its device: which checkpoint, in which number format, and its image tower in that format or in FP32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from structlog.typing import FilteringBoundLogger

from shiwu.contract import Head
from shiwu_worker.checkpoints.checkpoint_files import Checkpoint, WrongCheckpoint
from shiwu_worker.stages.encode.checkpoint import image_size, load_model, score_head
from shiwu_worker.stages.encode.device import choose_dtypes
from shiwu_worker.stages.encode.fusion import ATTENTION, NORMS, PATCHES, QKV, fuse
from shiwu_worker.stages.encode.towers import Tower, eager_tower

log: FilteringBoundLogger = structlog.get_logger()
MIN_COSINE: Final = 0.999
"""Smallest cosine between the vectors of a faster number format and those of FP32, for the format to be used."""
MAX_FUSION_ERROR: Final = 1e-4
"""Largest difference in FP32 between numbers of a vector with and without the rewritten image tower."""
COMPARED_IMAGES: Final = 2
"""Random images whose vectors are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """What an encoder is built from.

    Args:
        folder: the checkpoint, in the format of transformers.
        model_id, revision: the names of the model in answers.
        mean, std, rescale: of the checkpoint's image processor: (x · rescale - mean) / std for x of 0 to 255.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        batch_sizes: allowed batch sizes, ascending; no batch is larger than the last one.
        threads: threads of torch on a CPU; None lets torch choose, up to the number of usable cores.
        is_compiled: compile the image tower; each batch size takes 15 to 90 s at the start. On a GPU without a compiler
            it runs as graphs that are not compiled.
        has_graphs: replay CUDA graphs if the device is a GPU.
        fusions: steps that make the image tower faster (`patches`, `qkv`, `attention`); None: all on a GPU, none on a
            CPU.
        max_gpu_batch_s: time that a batch may take on a GPU; larger sizes are left out at the start.
        known_images: uint8 (n, h, w, 3); their reference vectors are computed on the CPU. A CPU uses the first only.
    """

    folder: Path
    model_id: str
    revision: str
    mean: Sequence[float]
    std: Sequence[float]
    rescale: float = 1 / 255
    device: str = "auto"
    dtype: str = "auto"
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    threads: int | None = None
    is_compiled: bool = False
    has_graphs: bool = True
    fusions: Sequence[str] | None = None
    max_gpu_batch_s: float = math.inf
    known_images: NDArray[np.uint8] | None = None


class DeviceModel:
    """A dual encoder on its device, in the best number format that agrees with FP32.

    Building it and every forward pass use all cores of a CPU, so the caller runs both on the exclusive thread.

    Raises:
        WrongCheckpoint: when the weights cannot be loaded, or take images of another size than the image processor
            makes.
    """

    def __init__(self, options: EncoderOptions, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._mean, self._std, self._rescale = tuple(options.mean), tuple(options.std), options.rescale
        self._fp32_tower: Tower | None = None
        self._fusions = chosen_fusions(options.fusions, device)
        module = load_model(checkpoint)
        # Read before the cast: in bfloat16 a scale of 100 would be 98.9.
        self.scale, self.bias = score_head(module)
        self.default_head: Head = "softmax" if self.bias is None else "sigmoid"
        side = image_size(module)
        self.image_shape = (side, side, 3)
        known = options.known_images
        if known is not None and known.shape[1:] != self.image_shape:
            raise WrongCheckpoint(
                f"{checkpoint.config}: the model takes images of {side}×{side}, and the image processor makes "
                f"{known.shape[2]}×{known.shape[1]}; take both from the same model"
            )
        if known is not None and device.type == "cpu":
            known = known[:1]  # a CPU runs one program for all sizes, and each reference takes a pass
        self.known_images = known
        """The known images that are used, uint8 (n, h, w, 3)."""
        self.known_vectors = None if known is None else self._encode_on_cpu(module, known)
        """Of the known images, float32 (n, d), in FP32 on the CPU whatever the device is; NaN if the model gives it."""
        module = self._fused(module, known)
        self.module, self.dtype = self._cast(module.to(device), choose_dtypes(options.dtype, device), known)
        """The model of transformers, and its number format."""
        sample: torch.Tensor | NDArray[np.float32] | None = self.known_vectors
        if sample is None:
            sample = self.eager_tower()(self.blank_images(1))
        self.vector_width = int(sample.shape[1])

    def eager_tower(self) -> Tower:
        """The image tower in the chosen number format, run by torch operator by operator."""
        return self._tower(self.module, self.dtype, self._device)

    def blank_images(self, count: int) -> torch.Tensor:
        """Grey images uint8 (count, h, w, 3) on the device."""
        return torch.full((count, *self.image_shape), 127, dtype=torch.uint8, device=self._device)

    def encode_fp32(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images uint8 (n, h, w, 3) → vectors float32 (n, d), in FP32 whatever the number format is.

        The first call loads the checkpoint again if the format is another one; these weights then stay on the device.
        """
        if self._fp32_tower is None:
            is_fp32 = self.dtype is torch.float32
            module = self.module if is_fp32 else self._reload()
            self._fp32_tower = self._tower(module, torch.float32, self._device)
        with torch.inference_mode():
            raw = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
            vectors: NDArray[np.float32] = self._fp32_tower(raw).cpu().numpy()
        return vectors

    def _fused(self, module: Any, known: NDArray[np.uint8] | None) -> Any:
        """Rewrite the image tower; the model as it was loaded if its vectors are others then."""
        self._fusions = fuse(module, self._fusions, mean=self._mean, std=self._std, rescale=self._rescale)
        if not self._fusions or known is None or self.known_vectors is None:
            return module
        error = float(np.abs(self._encode_on_cpu(module, known[:1]) - self.known_vectors[:1]).max())
        # NaN fails this comparison, also where the model itself gives it.
        if error <= MAX_FUSION_ERROR or np.isnan(self.known_vectors[0]).any():
            log.info("model_fused", steps=list(self._fusions), largest_difference=error)
            return module
        log.error("fusion_refused", steps=list(self._fusions), largest_difference=error, expected=MAX_FUSION_ERROR)
        self._fusions = ()
        return load_model(self._checkpoint)

    def _reload(self) -> Any:
        """The model in FP32 on the device, with the image tower rewritten as before."""
        module = load_model(self._checkpoint)
        fuse(module, self._fusions, mean=self._mean, std=self._std, rescale=self._rescale)
        return module.to(self._device)

    def _tower(self, module: Any, dtype: torch.dtype, device: torch.device) -> Tower:
        return eager_tower(module, dtype=dtype, device=device, mean=self._mean, std=self._std, rescale=self._rescale)

    def _encode_on_cpu(self, module: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Vectors of the model as it was loaded: not yet moved to the device, not yet cast."""
        tower = self._tower(module, torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            vectors: NDArray[np.float32] = tower(torch.from_numpy(pixels)).numpy()
        return vectors

    def _cast(
        self, module: Any, dtypes: Sequence[torch.dtype], known: NDArray[np.uint8] | None
    ) -> tuple[Any, torch.dtype]:
        """Cast the image tower to the first format whose vectors agree with those of FP32.

        The last format is not compared. The text tower stays FP32: labels are encoded once, so its speed matters
        little, and no label can overflow.
        """
        *compared, last = dtypes
        if not compared:
            return _cast_images(module, last), last
        noise = np.random.default_rng(0).integers(0, 256, (COMPARED_IMAGES, *self.image_shape), np.uint8)
        raw = torch.from_numpy(noise if known is None else np.concatenate([noise, known])).to(self._device)
        with torch.inference_mode():
            expected = self._tower(module, torch.float32, self._device)(raw)
            for dtype in compared:
                vectors = self._tower(_cast_images(module, dtype), dtype, self._device)(raw)
                cosine = float((vectors * expected).sum(dim=1).min())
                if cosine >= MIN_COSINE:
                    return module, dtype
                log.info(
                    "dtype_refused",
                    dtype=str(dtype),
                    cosine=round(cosine, 4),
                    expected=MIN_COSINE,
                    meaning="vectors of this model are not precise enough in this format here; trying the next one",
                )
                # A cast rounds the weights, so the next format starts from unrounded ones.
                module = self._reload()
        return _cast_images(module, last), last


def chosen_fusions(asked: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """The steps to take; what is fast on a GPU only is not tried on a CPU unless it was asked for."""
    if asked is not None:
        return tuple(asked)
    return (PATCHES, QKV, ATTENTION, NORMS) if device.type == "cuda" else (NORMS,)


def _cast_images(module: Any, dtype: torch.dtype) -> Any:
    """Cast everything but the text tower and the scale; returns the module."""
    for name, child in module.named_children():
        if not name.startswith("text"):
            child.to(dtype)
    return module
