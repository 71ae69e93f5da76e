"""Memory and utilisation of the GPU or MIG instance of this process, as NVIDIA's driver (NVML) reports them."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml
import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.runtime.nvidia import handle_of

log: FilteringBoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class GpuState:
    """State of the GPU at one moment.

    `used_bytes` counts all processes. `utilisation` is 0 to 1, or None if the driver does not report it (MIG).
    """

    used_bytes: int
    total_bytes: int
    utilisation: float | None


class GpuMonitor:
    """Keeps the state of one GPU as of the last `update`.

    Args:
        uuid: UUID of the GPU or MIG instance of this process; None for a CPU.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._is_open = False
        self._state: GpuState | None = None

    def update(self) -> None:
        """Ask the driver. If it fails there is no state until a later update succeeds."""
        if self._uuid is None:
            return
        try:
            if not self._is_open:
                # Once, and never shut down: the initialisation takes longer than all later calls.
                pynvml.nvmlInit()
                self._is_open = True
            self._state = _state(self._uuid)
        except pynvml.NVMLError_LibraryNotFound:
            log.warning(
                "nvml_unavailable", meaning="GPU memory and utilisation are not exported: expected libnvidia-ml.so.1"
            )
            self._uuid = None
        except pynvml.NVMLError:
            self._state = None

    def state(self) -> GpuState | None:
        """Return the last state; None without a GPU or without a reply of the driver."""
        return self._state


def _state(uuid: str) -> GpuState:
    handle = handle_of(uuid)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except pynvml.NVMLError:
        utilisation = None
    return GpuState(used_bytes=int(memory.used), total_bytes=int(memory.total), utilisation=utilisation)
