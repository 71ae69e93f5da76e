"""Whether the GPU can read the loaders' shared memory itself, and how quickly."""

from __future__ import annotations

import mmap
import os
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from bench.card.ceilings import IMAGE_BYTES, timed_ms
from bench.card.measure import Measures, need_cuda

IMAGES: Final = 256


def measures(*, tiny: bool) -> Measures:
    """Registering of a memfd, and copies from it next to copies from pinned memory."""
    images = 4 if tiny else IMAGES
    yield "memfd", partial(_memfd, images)
    yield "copy of registered memory, GB/s", partial(_registered, images)
    yield "rows one by one, GB/s", partial(_rows, images)


class Shared:
    """Memory as that of the loaders' slots: a memfd that is mapped."""

    def __init__(self, images: int) -> None:
        size = images * IMAGE_BYTES
        descriptor = os.memfd_create("card-probe")
        os.ftruncate(descriptor, size)
        self.memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self.array = np.frombuffer(self.memory, np.uint8).reshape(images, IMAGE_BYTES)
        self.array[:] = np.random.default_rng(0).integers(0, 256, self.array.shape, np.uint8)

    def register(self) -> int:
        """Let CUDA lock the memory; returns its error code, 0 for success."""
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
        return int(cudart.cudaHostRegister(self.array.ctypes.data, self.array.nbytes, 0))

    def unregister(self) -> None:
        """Undo `register`."""
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
        cudart.cudaHostUnregister(self.array.ctypes.data)


def _memfd(images: int) -> dict[str, int]:
    return {"MiB": Shared(images).array.nbytes >> 20}


def _registered(images: int) -> dict[str, Any]:
    need_cuda()
    shared = Shared(images)
    target = torch.empty((images, IMAGE_BYTES), dtype=torch.uint8, device="cuda")
    source = torch.from_numpy(shared.array)
    found: dict[str, Any] = {"pageable": _gb_s(target, source)}
    code = shared.register()
    found["error code of cudaHostRegister"] = code
    if code == 0:
        found["registered"] = _gb_s(target, source)
        found["equal"] = bool((target.cpu() == source).all())
        shared.unregister()
    pinned = torch.empty((images, IMAGE_BYTES), dtype=torch.uint8, pin_memory=True)
    return found | {"pinned": _gb_s(target, pinned)}


def _rows(images: int) -> float:
    need_cuda()
    shared = Shared(images)
    if shared.register():
        raise RuntimeError("expected that CUDA registers a memfd")
    target = torch.empty((images, IMAGE_BYTES), dtype=torch.uint8, device="cuda")
    source = torch.from_numpy(shared.array)
    order: list[int] = np.random.default_rng(0).permutation(images).tolist()

    def copy() -> None:
        for place, row in enumerate(order):
            target[place].copy_(source[row], non_blocking=True)

    ms = timed_ms(copy, repeats=10)
    shared.unregister()
    return round(target.nbytes / ms / 1e6, 2)


def _gb_s(target: torch.Tensor, source: torch.Tensor) -> float:
    ms = timed_ms(lambda: target.copy_(source, non_blocking=True), repeats=20)
    return round(target.nbytes / ms / 1e6, 2)
