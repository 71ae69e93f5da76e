"""The card or MIG instance of this process, as NVIDIA's driver sees it: memory and utilisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml
import structlog

log: Any = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class GpuState:
    """One look. `used_bytes` is of all processes; `utilisation`, 0 to 1, is None where it is not told (MIG)."""

    used_bytes: int
    total_bytes: int
    utilisation: float | None


class GpuMonitor:
    """Keeps the state of one card, as of the last `look`.

    Args:
        uuid: of the card or MIG instance that this process works on; None for a CPU.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._is_open = False
        self._state: GpuState | None = None

    def update(self) -> None:
        """Ask the driver. Where it does not answer there is no state, and it is asked again at the next look."""
        if self._uuid is None:
            return
        try:
            if not self._is_open:
                # Once, and never closed: it takes longer than all the questions after it.
                pynvml.nvmlInit()
                self._is_open = True
            self._state = _state(self._uuid)
        except pynvml.NVMLError_LibraryNotFound:
            log.warning(
                "nvml_unavailable", meaning="GPU memory and utilisation are not told: expected libnvidia-ml.so.1"
            )
            self._uuid = None
        except pynvml.NVMLError:
            self._state = None

    def state(self) -> GpuState | None:
        """What it said; None where there is no card or no answer."""
        return self._state


def _state(uuid: str) -> GpuState:
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except pynvml.NVMLError:
        utilisation = None
    return GpuState(used_bytes=int(memory.used), total_bytes=int(memory.total), utilisation=utilisation)
