# ruff: noqa: N802, N803, D102  the fake has the names of the library
"""NVIDIA's library with GPUs of our choice: replies in the form of nvidia-ml-py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import pytest


@dataclass
class FakeGpu:
    """A GPU as the driver reports it. `instances` has None for a number without an instance; None: no MIG."""

    uuid: str
    masks: tuple[int, ...] | None = None
    instances: list[str | None] | None = None
    is_split: bool = True
    is_lost: bool = False
    is_forbidden: bool = False
    """Whether the cgroup of the process denies it."""
    remapped: tuple[int, int, bool, bool] | None = None
    """Rows remapped after correctable and uncorrectable errors, whether one waits for a reset, whether one failed."""
    recovery_action: int | None = 0
    """What the driver wants to be done; None if the GPU has no such field."""
    retires_pages: bool | None = None
    """Whether pages are left out at the next reset, of a GPU before Ampere."""


@dataclass
class FakeNvml:
    """The functions of nvidia-ml-py that shiwu calls, with the same names, arguments, results and errors."""

    gpus: list[FakeGpu] = field(default_factory=list)
    has_driver: bool = True
    init_error: int | None = None
    """What the driver answers in place of its GPUs."""
    count_error: int | None = None
    opened: int = 0

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.opened == 1
        if self.count_error is not None:
            raise pynvml.NVMLError(self.count_error)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.gpus[index].is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if self.gpus[index].is_forbidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, handle: FakeGpu | str) -> str:
        return handle if isinstance(handle, str) else handle.uuid

    def nvmlDeviceGetMigMode(self, device: FakeGpu) -> list[int]:
        if device.instances is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(device.is_split), 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeGpu) -> int:
        return len(device.instances or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeGpu, index: int) -> str:
        instance = (device.instances or [])[index]
        if instance is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return instance

    def nvmlDeviceGetCpuAffinityWithinScope(
        self,
        handle: FakeGpu,
        cpuSetSize: int,
        scope: int,
    ) -> ctypes.Array[ctypes.c_ulonglong]:
        assert scope == pynvml.NVML_AFFINITY_SCOPE_NODE
        if handle.masks is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return (ctypes.c_ulonglong * cpuSetSize)(*handle.masks[:cpuSetSize])

    def nvmlDeviceGetName(self, handle: FakeGpu | str) -> str:
        return "NVIDIA H200 MIG 1g.18gb" if isinstance(handle, str) else "NVIDIA H200"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu | str:
        if any(gpu.is_lost for gpu in self.gpus):  # "if any GPU has fallen off the bus"
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if any(uuid in (gpu.instances or ()) for gpu in self.gpus):
            return uuid
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetRemappedRows(self, device: FakeGpu) -> tuple[int, int, bool, bool]:
        if device.remapped is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return device.remapped

    def nvmlDeviceGetFieldValues(self, device: FakeGpu, fieldIds: list[int]) -> list[SimpleNamespace]:
        assert fieldIds == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        code = pynvml.NVML_SUCCESS if device.recovery_action is not None else pynvml.NVML_ERROR_NOT_SUPPORTED
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(uiVal=device.recovery_action or 0))]

    def nvmlDeviceGetRetiredPagesPendingStatus(self, device: FakeGpu) -> int:
        if device.retires_pages is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(device.retires_pages)

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu | str) -> SimpleNamespace:
        return SimpleNamespace(used=3, total=8)

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu | str) -> SimpleNamespace:
        return SimpleNamespace(gpu=40)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86.10"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the functions of nvidia-ml-py; each must exist there."""
        for name in (name for name in dir(self) if name.startswith("nvml")):
            assert callable(getattr(pynvml, name)), "the library has it"
            monkeypatch.setattr(pynvml, name, getattr(self, name))
