"""Chooses the device and the number formats of a model, and tells what an error of the device means."""

from __future__ import annotations

import os
import traceback
from typing import Final

import torch

from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError
from shiwu_worker.runtime.nvidia import device_uuid, driver_version, gpus_are_hidden, list_gpus, why_no_gpu
from shiwu_worker.runtime.proc import cpu_flags

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AMPERE: Final = (8, 0)
"""The first compute capability whose tensor cores take bfloat16."""


def choose_device(asked: str) -> torch.device:
    """The device to use; `auto` is the first GPU if there is one, otherwise the CPU.

    Raises:
        FatalError: with ExitCode.MODEL, when torch cannot use the device that was asked for; with ExitCode.CONFIG, when
            `auto` finds a GPU that torch cannot use. On a CPU the worker would be a hundred times slower.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        if not gpus_are_hidden():
            _refuse_the_cpu()
        return torch.device("cpu")
    device = torch.device(asked)
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= usable:
        raise FatalError(
            ExitCode.MODEL, f"SHIWU_DEVICE: expected a GPU that torch can use, got {asked}: {_missing(usable)}"
        )
    return device


def _refuse_the_cpu() -> None:
    """Raise FatalError if this machine has a GPU, which torch cannot use."""
    if gpus := list_gpus():
        names = ", ".join(gpu.name for gpu in gpus[:8])
        text = f"SHIWU_DEVICE=auto: expected that torch can use {names}, which the driver lists: {_missing(0)}"
        raise FatalError(ExitCode.CONFIG, text)
    if reason := why_no_gpu():
        text = f"SHIWU_DEVICE=auto: expected a GPU that can be used, or a machine without one; {reason}; check "
        raise FatalError(ExitCode.CONFIG, f"{text}nvidia-smi, or set SHIWU_DEVICE=cpu")


def _missing(usable: int) -> str:
    """Why torch cannot use a GPU, and what to do."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs; install one with CUDA, or set SHIWU_DEVICE=cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible:.80}"
    driver = driver_version() or "absent"
    versions = f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}, and the driver is {driver}"
    reason = "".join(f"; {fault}" for fault in (why_no_gpu(), _refusal_of_cuda()) if fault)
    return f"torch finds {usable}{limit}; {versions}{reason}; check nvidia-smi, or set SHIWU_DEVICE=cpu"


def _refusal_of_cuda() -> str | None:
    """What CUDA says at its initialisation: also with a good driver it may wait for NVIDIA's Fabric Manager."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's own
    except RuntimeError as error:
        return f"CUDA says: {' '.join(str(error).split())[:300]}"
    except AssertionError:  # a build for CPUs
        return None
    return None


def keep_full_precision() -> None:
    """Let a GPU compute FP32 in FP32, and sum FP16 products in FP32. The settings hold for the process.

    By default cuDNN rounds FP32 to TF32, also in the reference that other formats are compared with, and cuBLAS may
    round partial sums to FP16, which overflow at 65,504.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


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
    reported = str(torch.cuda.get_device_properties(device).uuid)
    return device_uuid(reported, index=device.index or 0, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that torch has reserved on the GPU, and all that it has; None for a CPU. Does not wait for the GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_reserved(device), int(torch.cuda.get_device_properties(device).total_memory)


def device_name(device: torch.device) -> str:
    """The device's name in answers: the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_OUT_OF_MEMORY: Final = 2
"""cudaErrorMemoryAllocation. Unlike most errors of CUDA it does not last."""
_LOST_TEXTS: Final = ("CUDA error", "cuDNN error", "CUBLAS_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
_NO_KERNEL_IMAGE: Final = 209
"""cudaErrorNoKernelImageForDevice, of a GPU before Turing."""
_MEMORY_TEXTS: Final = (
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # the statuses of cuDNN 9 for memory of the host and of the device
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    # In place of its own error: to report the memory, torch's allocator asks NVML, which tells a container with a MIG
    # instance nothing (pytorch#112377, #197312).
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
)


def error_kind_of(error: BaseException, device: torch.device) -> DeviceErrorKind:
    """What an error of a forward pass means for its batch.

    An error that is not known to be one of the device is followed by a synchronisation: after a lost device that
    raises, so no single image counts as the cause. After one of memory, what the failed pass held is freed.
    """
    kind = _kind_by_type(error)
    try:
        if kind is DeviceErrorKind.OUT_OF_MEMORY:
            _forget_frames(error)
            torch.cuda.empty_cache()  # has no effect if CUDA is not in use
        elif kind is DeviceErrorKind.OTHER and device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return DeviceErrorKind.LOST
    return kind


def is_lost(error: BaseException) -> bool:
    """Whether the device has failed; not where this build of torch has no kernels for it."""
    is_unknown = getattr(error, "error_code", None) == _NO_KERNEL_IMAGE
    return _kind_by_type(error) is DeviceErrorKind.LOST and not is_unknown


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory, whichever library tells so."""
    return _kind_by_type(error) is DeviceErrorKind.OUT_OF_MEMORY


def _forget_frames(error: BaseException) -> None:
    """Clear the variables of the calls that an error came through.

    The error is kept while parts of the batch are tried again. Its traceback would keep the activations of the failed
    pass until then, and the parts would lack the same memory.
    """
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        each = chain.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            chain += [each.__cause__, each.__context__]


def _kind_by_type(error: BaseException) -> DeviceErrorKind:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(known in text for known in _MEMORY_TEXTS):
        return DeviceErrorKind.OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        # Loading a module, a handle of cuBLAS and a graph allocate outside torch's allocator.
        is_memory = getattr(error, "error_code", None) == _OUT_OF_MEMORY
        return DeviceErrorKind.OUT_OF_MEMORY if is_memory else DeviceErrorKind.LOST
    return DeviceErrorKind.LOST if any(known in text for known in _LOST_TEXTS) else DeviceErrorKind.OTHER


def _cpu_has_bf16() -> bool:
    return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))
