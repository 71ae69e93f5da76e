"""NVIDIA's library (NVML): which GPUs and MIG instances this machine has, and whether one of them is broken.

Without a driver there are none. Every function opens the library, and closes it before it returns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pynvml
import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.runtime.proc import read_text

log: FilteringBoundLogger = structlog.get_logger()
MASK_BITS: Final = 64
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
NVIDIA: Final = "0x10de"
"""The vendor of a PCI device."""
GPU_CLASSES: Final = ("0x0300", "0x0302")
"""Beginnings of the class of a PCI device: a GPU with and without outputs for screens."""
HIDES_ALL: Final = frozenset({"", "-1", "NoDevFiles"})
"""Values of CUDA_VISIBLE_DEVICES by which no GPU is meant; Slurm sets the last one in jobs without a GPU."""


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
    order: int = -1
    """Its number in CUDA, which counts only the GPUs that this process has permission for; -1 for the CPU."""


@dataclass(frozen=True, slots=True)
class UnusableGpu:
    """A GPU that this machine has and no program can use."""

    name: str
    reason: str


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES asks for no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in HIDES_ALL


def list_gpus() -> list[Gpu]:
    """Return all GPUs of this machine, with MIG instances in place of their GPU. Numbers are those of nvidia-smi."""
    found: list[Gpu] = []
    with _nvml() as error:
        for each in _all_gpus() if error is None else ():
            if isinstance(each, Gpu):
                found.append(each)
            else:
                log.error("gpu_skipped", gpu=each.name, error=each.reason)
    return found


def unusable_gpus() -> list[UnusableGpu]:
    """Return the GPUs that `list_gpus` leaves out because they are broken or not set up."""
    with _nvml() as error:
        return [each for each in _all_gpus() if isinstance(each, UnusableGpu)] if error is None else []


def why_no_gpu(*, pci: Path = PCI_DEVICES) -> str | None:
    """Return why no GPU can be used although this machine has one or more; None if it has none, or one can be used.

    GPUs for which this process lacks permission are not counted: they are those of others. A driver that is not loaded
    counts only if there is a GPU of NVIDIA, because an image may contain the library.
    """
    with _nvml() as error:
        if error is None:
            found = list(_all_gpus())
            wrong = [f"{each.name}: {each.reason}" for each in found if isinstance(each, UnusableGpu)]
            return "; ".join(wrong[:8]) if len(wrong) == len(found) and wrong else None
    is_absent = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND or (
        error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED and not _has_gpu(pci)
    )
    return None if is_absent else f"NVIDIA's driver does not answer ({error})"


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, such as `580.95.05`; None without a driver."""
    with _nvml() as error:
        if error is None:
            with suppress(pynvml.NVMLError):
                return str(pynvml.nvmlSystemGetDriverVersion())
    return None


def gpu_models() -> tuple[str, ...]:
    """Return the different models of the GPUs and MIG instances of this machine, such as `NVIDIA H200 MIG 1g.18gb`."""
    names: set[str] = set()
    gpus = list_gpus()
    with _nvml():
        for gpu in gpus:
            with suppress(pynvml.NVMLError):
                names.add(str(pynvml.nvmlDeviceGetName(handle_of(gpu.uuid or ""))))
    return tuple(sorted(names))


def device_uuid(reported: str, *, index: int, visible: str | None) -> str:
    """Return the UUID by which NVML knows a device of CUDA, `GPU-…` or `MIG-…`.

    For a MIG instance CUDA reports its UUID, and versions before 13 that of the whole GPU. Its prefix is not reported.

    Args:
        reported: the UUID that CUDA reports for its device `index`.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set, as in a container that got one instance.
    """
    gpus = [(gpu.uuid or "", gpu.gpu_uuid) for gpu in list_gpus()]
    whole = f"GPU-{reported}"
    words = [] if visible is None else [word.strip() for word in visible.split(",")]
    word = words[index] if index < len(words) else ""
    named = [uuid for uuid, _ in gpus if uuid.startswith(word)] if word.startswith("MIG-") else []
    own = [uuid for uuid, _ in gpus if uuid in {whole, f"MIG-{reported}"}]
    instances = [uuid for uuid, gpu_uuid in gpus if gpu_uuid == whole]
    return next((found[0] for found in (named, own, instances) if len(found) == 1), whole)


def fault_of(uuid: str) -> str | None:
    """Return why this GPU cannot be used before an operator has acted, as its driver tells; None without a reason."""
    with _nvml() as closed:
        if closed is not None:
            return None
        try:
            handle = handle_of(uuid)
            return _recovery_action(handle) or _memory_fault(handle)
        except pynvml.NVMLError as error:
            return _LOST.get(error.value)


def handle_of(uuid: str) -> object:
    """Return the handle of a GPU or MIG instance. The library must be open.

    Its own search by UUID fails for every GPU once any of them has fallen off the bus.

    Raises:
        NVMLError: there is none, or it is lost.
    """
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
            for handle in _handles():
                with suppress(pynvml.NVMLError):
                    if str(pynvml.nvmlDeviceGetUUID(handle)) == uuid:
                        return handle
        raise


def _recovery_action(handle: object) -> str | None:
    """What the driver wants to be done before another program uses the GPU, as `nvidia-smi -q` shows it.

    To drain traffic between GPUs is none of these, because a worker uses one GPU.
    """
    try:
        [field] = pynvml.nvmlDeviceGetFieldValues(handle, [RECOVERY_ACTION])
    except pynvml.NVMLError as error:
        if error.value in {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED}:
            raise
        return None
    return _ACTIONS.get(int(field.value.uiVal)) if field.nvmlReturn == pynvml.NVML_SUCCESS else None


def _memory_fault(handle: object) -> str | None:
    """Rows that wait for a reset to be replaced are none: by NVIDIA's documents new programs may run meanwhile."""
    try:
        _, _, _, has_failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
            raise
        # GPUs before Ampere, as the T4, leave pages of their memory out.
        is_pending = pynvml.nvmlDeviceGetRetiredPagesPendingStatus(handle) == pynvml.NVML_FEATURE_ENABLED
        return "broken pages of its memory are left out after the next reset of the GPU" if is_pending else None
    return "its memory has more broken rows than it can replace" if has_failed else None


RECOVERY_ACTION: Final = 230
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, which early versions of nvidia-ml-py lack."""
_ACTIONS: Final = {
    1: "it has to be reset",
    2: "its machine has to be rebooted",
    4: "it has to be reset when no program uses it any more",
    6: "its PCIe bus has to be reset",
    7: "its machine has to be rebooted",
}
"""nvmlDeviceGpuRecoveryAction_t."""
_LOST: Final = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "it has fallen off the bus",
    pynvml.NVML_ERROR_RESET_REQUIRED: "it has to be reset",
    pynvml.NVML_ERROR_NOT_FOUND: "the driver does not list it any more",
}
"""Errors of NVML that a restart of the worker does not change."""


def _all_gpus() -> Iterator[Gpu | UnusableGpu]:
    try:
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        yield UnusableGpu("GPUs", f"they cannot be counted ({error})")
        return
    order = 0
    for index in range(count):
        name = f"gpu{index}"
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_NO_PERMISSION:  # which hides GPUs of others, as a cgroup does
                yield UnusableGpu(name, _LOST.get(error.value, str(error)))
                order += 1
            continue
        near = _near_cpus(handle)
        instances = _instances(handle)
        if instances is None:
            yield Gpu(name=name, uuid=uuid, gpu=index, gpu_uuid=uuid, near_cpus=near, order=order)
        elif not instances:
            yield UnusableGpu(name, "it is in MIG mode, and there is no instance for this process")
        for number, instance in instances or ():
            name_of_instance = f"{name}-mig{number}"
            yield Gpu(name=name_of_instance, uuid=instance, gpu=index, gpu_uuid=uuid, near_cpus=near, order=order)
        order += 1


def _has_gpu(pci: Path) -> bool:
    """Whether there is a GPU of NVIDIA, with or without a driver."""
    return any(
        read_text(device / "vendor").strip() == NVIDIA and read_text(device / "class").startswith(GPU_CLASSES)
        for device in pci.glob("*")
    )


def _handles() -> Iterator[object]:
    """The handles of all GPUs that answer, and of their MIG instances."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            yield gpu
            for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                with suppress(pynvml.NVMLError):  # a number without an instance
                    yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)


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
def _nvml() -> Iterator[pynvml.NVMLError | None]:
    """Open the library for the block; yields the error if it does not answer."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield error
        return
    try:
        yield None
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
