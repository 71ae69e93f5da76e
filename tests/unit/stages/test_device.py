"""Which device and number formats are chosen, and what each error of a device means."""

from __future__ import annotations

import weakref

import pynvml
import pytest
import torch

from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError
from shiwu_worker.stages.encode.device import choose_device, choose_dtypes, error_kind_of
from tests.support.fake_nvml import FakeGpu, FakeNvml


@pytest.mark.parametrize(
    ("asked", "build", "found", "text"),
    [
        ("cuda", None, 0, "is a build for CPUs; install one with CUDA"),
        ("cuda", "13.0", 0, "torch finds 0 with CUDA_VISIBLE_DEVICES=GPU-x"),
        ("cuda:2", "13.0", 2, "torch finds 2 with"),
    ],
)
def test_missing_gpu_gives_the_reason_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, asked: str, build: str | None, found: int, text: str
) -> None:
    """The error has the setting, the reason and the exit code for models, after which a launcher tries again."""
    monkeypatch.setattr("torch.version.cuda", build)
    monkeypatch.setattr("torch.cuda.is_available", lambda: found > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x")
    with pytest.raises(FatalError, match=f"SHIWU_DEVICE: expected a GPU .*, got {asked}: .*{text}") as caught:
        choose_device(asked)
    assert caught.value.exit_code is ExitCode.MODEL
    if found:
        assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_auto_chooses_device_and_dtype() -> None:
    """FP16 on CUDA, never on a CPU; what is asked for by name is taken."""
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtypes("auto", torch.device("cpu")) in {(torch.float32,), (torch.bfloat16, torch.float32)}
    assert choose_dtypes("float16", torch.device("cpu")) == (torch.float16,)
    assert choose_dtypes("float32", torch.device("cuda")) == (torch.float32,)


@pytest.mark.parametrize(
    ("visible", "device"),
    [(None, None), ("GPU-a", None), ("", "cpu"), ("-1", "cpu"), ("NoDevFiles", "cpu")],
    ids=["unset", "one", "none", "-1", "Slurm"],
)
def test_gpu_that_torch_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str | None
) -> None:
    """A driver that is too old must not make a worker on a CPU; one that hides all GPUs asks for the CPU."""
    FakeNvml(gpus=[FakeGpu("GPU-a")]).install(monkeypatch)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if device is not None:
        assert choose_device("auto").type == device
        return
    with pytest.raises(FatalError, match=r"can use gpu0, .*driver for CUDA 13.0, and the driver is 570") as caught:
        choose_device("auto")
    assert caught.value.exit_code is ExitCode.CONFIG


def test_refusal_of_cuda_itself_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVSwitch whose Fabric Manager does not run: driver and nvidia-smi look well."""

    def refuse() -> None:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount().\n  Error 802: system not yet initialized")

    FakeNvml(gpus=[FakeGpu("GPU-a")]).install(monkeypatch)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", refuse)
    for device in ("auto", "cuda"):
        with pytest.raises(
            FatalError, match=r"CUDA says: Unexpected error .*\. Error 802: system not yet initialized;"
        ):
            choose_device(device)


@pytest.mark.parametrize(
    ("nvml", "text"),
    [
        (FakeNvml(init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), "version mismatch"),
        (FakeNvml(gpus=[FakeGpu("GPU-a", is_lost=True)]), "gpu0: it has fallen off the bus"),
        (FakeNvml(gpus=[FakeGpu("GPU-a", instances=[])]), "gpu0: it is in MIG mode"),
    ],
    ids=["driver", "lost", "MIG without instances"],
)
def test_broken_gpu_makes_no_worker_on_a_cpu(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, text: str) -> None:
    """As when a worker starts again after its GPU was lost; the text has the reason and what to do."""
    nvml.install(monkeypatch)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(FatalError, match=f"{text}.*or set SHIWU_DEVICE=cpu") as caught:
        choose_device("auto")
    assert caught.value.exit_code is ExitCode.CONFIG
    with pytest.raises(FatalError, match=text):
        choose_device("cuda")


MIG_WITHOUT_MEMORY = 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1165'
"""What torch 2.11 says on a MIG instance of a container when its memory is full."""


def device_error(text: str, code: int | None = None) -> torch.AcceleratorError:
    """An error of CUDA as torch raises it."""
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]  # set by torch's C++ code
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceErrorKind.OUT_OF_MEMORY),
        (MemoryError(), DeviceErrorKind.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory"), DeviceErrorKind.OUT_OF_MEMORY),
        (device_error("CUDA error: out of memory", 2), DeviceErrorKind.OUT_OF_MEMORY),
        (device_error("lazy loading failed", 2), DeviceErrorKind.OUT_OF_MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            DeviceErrorKind.OUT_OF_MEMORY,
        ),
        (RuntimeError("CUDA driver error: out of memory"), DeviceErrorKind.OUT_OF_MEMORY),
        (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceErrorKind.OUT_OF_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), DeviceErrorKind.OUT_OF_MEMORY),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            DeviceErrorKind.OUT_OF_MEMORY,
        ),
        (RuntimeError(MIG_WITHOUT_MEMORY), DeviceErrorKind.OUT_OF_MEMORY),
        (device_error("CUDA error: an illegal memory access was encountered", 700), DeviceErrorKind.LOST),
        (device_error("CUDA error: device-side assert triggered", 710), DeviceErrorKind.LOST),
        (device_error("CUDA error: unspecified launch failure", 719), DeviceErrorKind.LOST),
        (device_error("CUDA error: unknown"), DeviceErrorKind.LOST),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), DeviceErrorKind.LOST),
        (RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"), DeviceErrorKind.LOST),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceErrorKind.LOST),
        (ValueError("expected 3 channels"), DeviceErrorKind.OTHER),
    ],
    ids=lambda value: str(value)[:50],
)
def test_error_of_a_pass_has_a_meaning(error: BaseException, kind: DeviceErrorKind) -> None:
    """Out of memory halves the batch, a lost device ends the process, any other error belongs to an image."""
    assert error_kind_of(error, torch.device("cpu")) is kind


@pytest.mark.parametrize("is_lost", [False, True])
def test_unknown_error_on_a_lost_device_blames_no_image(monkeypatch: pytest.MonkeyPatch, is_lost: bool) -> None:
    """After a lost device every call fails with whatever error; a synchronisation tells."""

    def synchronize(device: torch.device) -> None:
        if is_lost:
            raise device_error("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    expected = DeviceErrorKind.LOST if is_lost else DeviceErrorKind.OTHER
    assert error_kind_of(ValueError("shape"), torch.device("cuda")) is expected


class Activations:
    """Stands for the memory of a pass."""


def test_failed_pass_holds_no_memory_while_parts_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is still there then, and its traceback would hold all that the pass had computed."""
    held: list[weakref.ref[Activations]] = []
    left: list[int] = []

    def failing_pass() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            activations = Activations()
            held.append(weakref.ref(activations))
            raise MemoryError from error

    monkeypatch.setattr("torch.cuda.empty_cache", lambda: left.append(sum(each() is not None for each in held)))
    with pytest.raises(MemoryError) as caught:
        failing_pass()
    assert error_kind_of(caught.value, torch.device("cpu")) is DeviceErrorKind.OUT_OF_MEMORY
    assert (len(held), left) == (2, [0])


def test_device_that_cannot_free_memory_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator in doubt, or a lost device, says so when it is asked to free memory; the worker has to restart."""

    def empty_cache() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr("torch.cuda.empty_cache", empty_cache)
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert error_kind_of(error, torch.device("cuda")) is DeviceErrorKind.LOST
