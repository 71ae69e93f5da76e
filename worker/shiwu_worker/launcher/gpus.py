"""Which GPUs of this machine get a worker: those that CUDA_VISIBLE_DEVICES shows and the operator chose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu_worker.runtime.nvidia import HIDES_ALL, Gpu, list_gpus

log: FilteringBoundLogger = structlog.get_logger()
_NUMBER: Final = re.compile(r"\+?(\d+)")
"""CUDA reads a number by strtoul: `1x` is 1; `x` and `-1` are no numbers."""
_CPU: Final = re.compile(r"cpu:(\d+)")


class UnknownGpu(ValueError):
    """The option names a GPU that this machine does not have."""


def find_gpus(*, visible: str | None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES=`visible` shows, with MIG instances in place of their GPU.

    None shows all. Numbers count the GPUs that this process has permission for, in the order of nvidia-smi. CUDA's are
    the same if the GPUs are of one model or CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    gpus = list_gpus()
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
            named = [gpu for gpu in gpus if gpu.gpu == int(word)] if word.isdecimal() else _of_uuid(gpus, word)
        if not named:
            known = ", ".join(f"{gpu.gpu} ({gpu.uuid})" for gpu in gpus)
            forms = f"cpu:N, all, or one of {known}" if known else "cpu:N or all, because no GPU is visible"
            raise UnknownGpu(f"--gpus: expected {forms}, got {word!r:.80}")
        if named[0] in chosen:
            raise UnknownGpu(f"--gpus: expected each GPU once, got {word!r:.80} again")
        chosen += named
    return chosen


def _visible_gpus(gpus: Sequence[Gpu], visible: str) -> list[Gpu]:
    """Filter as CUDA does: the first word that names no GPU ends the list, and a repeated GPU empties it."""
    kind = next((prefix for prefix in ("GPU-", "MIG-") if visible.strip().startswith(prefix)), None)
    found: list[Gpu] = []
    for word in (part.strip() for part in visible.split(",")):
        if kind is None:
            number = _NUMBER.match(word)
            named = [gpu for gpu in gpus if gpu.order == int(number[1])] if number else []
        else:
            named = _of_uuid(gpus, word) if word.startswith(kind) else []
        if not named:
            if word not in HIDES_ALL:
                log.warning("gpus_hidden", by=f"CUDA_VISIBLE_DEVICES={visible:.200}", no_gpu=word[:80])
            break
        if named[0] in found:
            log.warning("gpus_hidden", by=f"CUDA_VISIBLE_DEVICES={visible:.200}", twice=word[:80])
            return []
        found += named
    return found


def _of_uuid(gpus: Sequence[Gpu], start: str) -> list[Gpu]:
    """Return the GPU whose UUID has this prefix, or all its MIG instances; nothing if the prefix is ambiguous."""
    if start.startswith("MIG-"):
        found = [gpu for gpu in gpus if gpu.uuid is not None and gpu.uuid.startswith(start)]
        return found if len(found) == 1 else []
    found = [gpu for gpu in gpus if start and gpu.gpu_uuid.startswith(start)]
    return found if len({gpu.gpu_uuid for gpu in found}) == 1 else []
