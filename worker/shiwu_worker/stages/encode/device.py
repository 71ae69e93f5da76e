"""Chooses the device and the number formats of a model, and tells what an error of the device means."""

from __future__ import annotations

import os
from typing import Final

import torch

from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError
from shiwu_worker.runtime.proc import cpu_flags

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AMPERE: Final = (8, 0)
"""The first compute capability whose tensor cores take bfloat16."""


def choose_device(asked: str) -> torch.device:
    """The device to use; `auto` is the first GPU if there is one, otherwise the CPU.

    Raises:
        FatalError: with ExitCode.MODEL, when torch cannot use the device that was asked for.
    """
    if asked == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(asked)
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= usable:
        raise FatalError(
            ExitCode.MODEL, f"SHIWU_DEVICE: expected a GPU that torch can use, got {asked}: {_missing(usable)}"
        )
    return device


def _missing(usable: int) -> str:
    """Why torch cannot use a GPU, and what to do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs; install one with CUDA, or set SHIWU_DEVICE=cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible:.80}"
    return f"torch finds {usable}{limit}; check nvidia-smi and the driver, or set SHIWU_DEVICE=cpu"


def choose_dtypes(asked: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The formats to try, best first; a later one is used if the model overflows in the ones before.

    `auto` is float16 on a GPU, then bfloat16 if the GPU has tensor cores for it. On a CPU it is bfloat16 if the CPU
    computes in it; float16 is several times slower there than float32. A format that was asked for has no alternative.
    """
    if asked != "auto":
        return (_DTYPES[asked],)
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= _AMPERE
        return (torch.float16, *([torch.bfloat16] if has_bf16 else []), torch.float32)
    return (torch.bfloat16, torch.float32) if device.type == "cpu" and _cpu_has_bf16() else (torch.float32,)


def gpu_uuid(device: torch.device) -> str | None:
    """The UUID of the GPU or MIG instance, as NVIDIA's tools write it; None for a CPU."""
    if device.type != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    # For a MIG instance CUDA reports the UUID of the whole GPU.
    if index < len(visible) and visible[index].startswith("MIG-"):
        return visible[index]
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def device_name(device: torch.device) -> str:
    """The device's name in answers: the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def error_kind_of(error: BaseException) -> DeviceErrorKind:
    """What an error of a forward pass means for its batch."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()  # has no effect if CUDA is not in use
        return DeviceErrorKind.OUT_OF_MEMORY
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return DeviceErrorKind.OUT_OF_MEMORY
    is_lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return DeviceErrorKind.LOST if is_lost else DeviceErrorKind.OTHER


def _cpu_has_bf16() -> bool:
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))
