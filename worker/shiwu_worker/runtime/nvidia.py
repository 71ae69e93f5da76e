"""NVIDIA's library (NVML): which GPUs and MIG instances this machine has, and whether one of them is broken.

Without a driver there are none. Every function opens the library, and closes it before it returns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import pynvml
import structlog
from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()
MASK_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, one MIG instance of a GPU, or a share of the CPU."""

    name: str
    """`gpu0` with nvidia-smi's number, `gpu0-mig1`, `cpu0`."""
    uuid: str | None
    """`GPU-…` or `MIG-…`; None for the CPU."""
    gpu: int = -1
    """Number of the GPU in nvidia-smi; -1 for the CPU."""
    gpu_uuid: str = ""
    near_cpus: frozenset[int] = frozenset()
    """CPUs of its NUMA node that this process may use; empty if they are unknown."""


def list_gpus() -> list[Gpu]:
    """Return all GPUs of this machine, with MIG instances in place of their GPU. Numbers are those of nvidia-smi."""
    with _nvml() as available:
        return list(_all_gpus()) if available else []


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, such as `580.95.05`; None without a driver."""
    with _nvml() as available:
        if available:
            with suppress(pynvml.NVMLError):
                return str(pynvml.nvmlSystemGetDriverVersion())
    return None


def gpu_models() -> tuple[str, ...]:
    """Return the different models of the GPUs and MIG instances of this machine, such as `NVIDIA H200 MIG 1g.18gb`."""
    names: set[str] = set()
    with _nvml() as available:
        for gpu in _all_gpus() if available else ():
            with suppress(pynvml.NVMLError):
                names.add(str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))))
    return tuple(sorted(names))


def instance_uuid(index: int, *, visible: str | None) -> str | None:
    """Return the UUID of the MIG instance that CUDA uses as its device `index`; None where it uses a whole GPU.

    For a MIG instance CUDA may report the UUID of the whole GPU. In a container that got one instance,
    CUDA_VISIBLE_DEVICES is not set, and NVML lists that instance only.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    words = [] if visible is None else [word.strip() for word in visible.split(",")]
    if index < len(words) and words[index].startswith("MIG-"):
        return words[index]
    instances = [gpu.uuid for gpu in list_gpus() if gpu.uuid is not None and gpu.uuid.startswith("MIG-")]
    return instances[0] if len(instances) == 1 and index == 0 else None


def fault_of(uuid: str) -> str | None:
    """Return why this GPU cannot be used before an operator has acted, as its driver tells; None without a reason."""
    with _nvml() as available:
        if not available:
            return None
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            return _LOST.get(error.value)
        try:
            _, _, is_pending, has_failed = pynvml.nvmlDeviceGetRemappedRows(handle)
        except pynvml.NVMLError as error:
            return _LOST.get(error.value)  # a GPU without row remapping
    if has_failed:
        return "its memory has more broken rows than it can replace"
    return "broken rows of its memory are replaced at the next reset of the GPU" if is_pending else None


_LOST: Final = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "it has fallen off the bus",
    pynvml.NVML_ERROR_RESET_REQUIRED: "it has to be reset",
    pynvml.NVML_ERROR_NOT_FOUND: "the driver does not list it any more",
}
"""Errors of NVML that a restart of the worker does not change."""


def _all_gpus() -> Iterator[Gpu]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:
            log.error(
                "gpu_skipped", gpu=f"gpu{index}", error=str(error)
            )  # for example lost from the bus, or without permission
            continue
        near = _near_cpus(handle)
        instances = _instances(handle)
        if instances is None:
            yield Gpu(name=f"gpu{index}", uuid=uuid, gpu=index, gpu_uuid=uuid, near_cpus=near)
        for number, instance in instances or ():
            name = f"gpu{index}-mig{number}"
            yield Gpu(name=name, uuid=instance, gpu=index, gpu_uuid=uuid, near_cpus=near)


def _instances(handle: object) -> list[tuple[int, str]] | None:
    """Return numbers and UUIDs of the MIG instances of a GPU; None if it is not split."""
    try:
        is_split, _ = pynvml.nvmlDeviceGetMigMode(handle)
        max_instances = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_split else 0
    except pynvml.NVMLError:
        return None  # a GPU without MIG
    if not is_split:
        return None
    found: list[tuple[int, str]] = []
    for number in range(max_instances):
        with suppress(pynvml.NVMLError):  # a number without an instance
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            found.append((number, str(pynvml.nvmlDeviceGetUUID(instance))))
    return found


def _near_cpus(handle: object) -> frozenset[int]:
    """CPUs of the GPU's NUMA node that this process may use; empty where the driver does not tell."""
    allowed = os.sched_getaffinity(0)
    # The driver refuses a mask that has no room for all CPUs of the machine, also for those that are not allowed.
    words = max(*allowed, (os.cpu_count() or 1) - 1) // MASK_BITS + 1
    try:
        masks = pynvml.nvmlDeviceGetCpuAffinityWithinScope(handle, words, pynvml.NVML_AFFINITY_SCOPE_NODE)
    except pynvml.NVMLError:
        return frozenset()
    near = {word * MASK_BITS + bit for word, mask in enumerate(masks) for bit in range(MASK_BITS) if mask >> bit & 1}
    return frozenset(near & allowed)


@contextmanager
def _nvml() -> Iterator[bool]:
    """Open the library for the block; yields whether it answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
