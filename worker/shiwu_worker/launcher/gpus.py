"""GPUs of this machine, as NVIDIA's library (NVML) lists them; without a driver there are none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import pynvml
import structlog
from structlog.typing import FilteringBoundLogger

log: FilteringBoundLogger = structlog.get_logger()
MASK_BITS: Final = 64
_NUMBER: Final = re.compile(r"\+?(\d+)")
"""CUDA reads a number by strtoul: `1x` is 1; `x` and `-1` are no numbers."""
_CPU: Final = re.compile(r"cpu:(\d+)")


class UnknownGpu(ValueError):
    """The option names a GPU that this machine does not have."""


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


def find_gpus(*, visible: str | None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES=`visible` shows, with MIG instances in place of their GPU.

    None shows all. Numbers are those of nvidia-smi. CUDA's are the same if the GPUs are of one model or
    CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    with _nvml() as available:
        gpus = list(_all_gpus()) if available else []
    return gpus if visible is None or not gpus else _visible_gpus(gpus, visible)


def choose_gpus(gpus: Sequence[Gpu], asked: str) -> list[Gpu]:
    """Return the GPUs of a list such as `0,GPU-…,MIG-…,cpu:0`: numbers, UUIDs or prefixes of UUIDs, or `all`.

    Raises:
        UnknownGpu: an item names no GPU of this machine, or one that was named before.
    """
    if asked.strip() == "all":
        return list(gpus)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in asked.split(",")):
        if cpu := _CPU.fullmatch(word):
            named = [Gpu(name=f"cpu{int(cpu[1])}", uuid=None)]
        else:
            named = _of_number(gpus, word) if word.isdecimal() else _of_uuid(gpus, word)
        if not named:
            known = ", ".join(f"{gpu.gpu} ({gpu.uuid})" for gpu in gpus) or "no visible GPU"
            raise UnknownGpu(f"expected cpu:N, all, or one of {known}, got {word!r:.80}")
        if named[0] in chosen:
            raise UnknownGpu(f"expected each GPU once, got {word!r:.80} again")
        chosen += named
    return chosen


def _visible_gpus(gpus: Sequence[Gpu], visible: str) -> list[Gpu]:
    """Filter as CUDA does: the first word that names no GPU ends the list, and a repeated GPU empties it."""
    kind = next((prefix for prefix in ("GPU-", "MIG-") if visible.strip().startswith(prefix)), None)
    found: list[Gpu] = []
    for word in (part.strip() for part in visible.split(",")):
        if kind is None:
            number = _NUMBER.match(word)
            named = _of_number(gpus, number[1]) if number else []
        else:
            named = _of_uuid(gpus, word) if word.startswith(kind) else []
        if not named:
            if word not in {"", "-1"}:
                log.warning("gpus_hidden", by=f"CUDA_VISIBLE_DEVICES={visible:.200}", no_gpu=word[:80])
            break
        if named[0] in found:
            log.warning("gpus_hidden", by=f"CUDA_VISIBLE_DEVICES={visible:.200}", twice=word[:80])
            return []
        found += named
    return found


def _of_number(gpus: Sequence[Gpu], number: str) -> list[Gpu]:
    return [gpu for gpu in gpus if gpu.gpu == int(number)]


def _of_uuid(gpus: Sequence[Gpu], start: str) -> list[Gpu]:
    """Return the GPU whose UUID has this prefix, or all its MIG instances; nothing if the prefix is ambiguous."""
    if start.startswith("MIG-"):
        found = [gpu for gpu in gpus if gpu.uuid is not None and gpu.uuid.startswith(start)]
        return found if len(found) == 1 else []
    found = [gpu for gpu in gpus if start and gpu.gpu_uuid.startswith(start)]
    return found if len({gpu.gpu_uuid for gpu in found}) == 1 else []


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


def _instances(handle: Any) -> list[tuple[int, str]] | None:
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


def _near_cpus(handle: Any) -> frozenset[int]:
    allowed = os.sched_getaffinity(0)
    words = max(allowed) // MASK_BITS + 1
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
