"""The canary: encodes known images at the start and every few minutes, and checks their vectors.

Flipped bits in device memory, a faulty driver or overwritten weights give wrong vectors without an error. Each check
takes the next of the batch sizes in use, because a size has kernels and a graph of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import numpy as np
import structlog
from numpy.typing import NDArray
from structlog.typing import FilteringBoundLogger

from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, WrongVectors
from shiwu_worker.stages.encode.size_check import MIN_COSINE_TO_REFERENCE

log: FilteringBoundLogger = structlog.get_logger()
MIN_COSINE_TO_FIRST: Final = 0.999
"""Lowest cosine to the vector at the start; the same program on the same device gives more than 0.99999."""
MAX_LENGTH_ERROR: Final = 1e-3
OUT_OF_MEMORY_PAUSE_S: Final = 5.0
"""Pause before the next try after the device was out of memory."""


class Canary:
    """Encodes known images and checks their vectors. One thread at a time: the starting thread, then `encode`.

    Args:
        encode: pixels uint8 (m, h, w, 3) → vectors float32 (m, d), on the path that jobs take.
        images: the known images, uint8 (n, h, w, 3).
        references: their unit vectors float32 (n, d), computed in FP32 on the CPU.
        sizes: the batch sizes to check, ascending; called at each check. The first check takes the smallest.
        every_s: interval of the checks; 0 checks once.
        error_kind: what an error of `encode` means.
        on_wrong: called with the reason before the error is raised.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
        *,
        images: NDArray[np.uint8],
        references: NDArray[np.float32],
        sizes: Callable[[], Sequence[int]] = lambda: (1,),
        every_s: float,
        error_kind: Callable[[BaseException], DeviceErrorKind],
        on_wrong: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._encode = encode
        self._images = images
        self._references = references
        self._sizes = sizes
        self._rounds = 0
        self._every_s = every_s
        self._error_kind = error_kind
        self._on_wrong = on_wrong
        self._first: dict[int, NDArray[np.float32]] = {}
        """Batch size → its vectors at its first check."""
        self._due_s = 0.0

    def check_if_due(self) -> None:
        """Encode and check the known image if the interval has elapsed.

        Raises:
            FatalError: with ExitCode.CANARY for a wrong vector, with ExitCode.DEVICE if the device is lost.
        """
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._every_s if self._every_s else float("inf")
        sizes = self._sizes()
        size = sizes[self._rounds % len(sizes)]
        # A fixed order for each size, so that its vectors can be compared with those of its first check.
        numbers = (np.arange(size) + size - 1) % len(self._images)
        try:
            vectors = self._encode(self._images[numbers])
        except WrongVectors as error:
            self._fail(str(error))
        except Exception as error:  # border: the device's library may raise anything
            error_kind = self._error_kind(error)
            if error_kind is DeviceErrorKind.LOST:
                raise FatalError(ExitCode.DEVICE, f"the device failed on the health-check image: {error}") from error
            if error_kind is DeviceErrorKind.OUT_OF_MEMORY:
                # Another process may hold the memory for a moment; that does not mean that the device computes wrong.
                log.warning("canary_skipped", reason="the device was out of memory", retry_in_s=OUT_OF_MEMORY_PAUSE_S)
                self._due_s = now_s + OUT_OF_MEMORY_PAUSE_S
                return
            self._fail(f"{type(error).__name__}: {error!s:.200}")
        self._check(vectors, self._references[numbers])
        self._rounds += 1

    def _check(self, vectors: NDArray[np.float32], references: NDArray[np.float32]) -> None:
        size = len(references)
        if vectors.shape != references.shape:
            self._fail(f"expected vectors of shape {references.shape}, got {vectors.shape}")
        # NaN is the least of numbers that contain it, and fails every one of these comparisons.
        lengths = np.linalg.norm(vectors, axis=1)
        if not np.abs(lengths - 1).max() <= MAX_LENGTH_ERROR:
            self._fail(f"expected vectors of length 1, got {_farthest(lengths):.4g}{_in(size)}")
        cosine = float((vectors * references).sum(axis=1).min())
        if not cosine >= MIN_COSINE_TO_REFERENCE:
            least = MIN_COSINE_TO_REFERENCE
            self._fail(f"expected a cosine of {least} or more to FP32 on the CPU, got {cosine:.4f}{_in(size)}")
        first = self._first.setdefault(size, vectors.copy())
        cosine_to_first = float((vectors * first).sum(axis=1).min())
        if not cosine_to_first >= MIN_COSINE_TO_FIRST:
            self._fail(
                f"expected a cosine of {MIN_COSINE_TO_FIRST} or more to the first vector, got {cosine_to_first:.4f}"
                f"{_in(size)}"
            )
        log.debug("canary", size=size, cosine=round(cosine, 6), to_first=round(cosine_to_first, 6))

    def _fail(self, wrong: str) -> NoReturn:
        self._on_wrong(wrong)
        raise FatalError(ExitCode.CANARY, f"the health-check image got a wrong result: {wrong}")


def _farthest(lengths: NDArray[np.float32]) -> float:
    """The length that is farthest from 1, or NaN where there is one."""
    return float(lengths[np.abs(lengths - 1).argmax()])


def _in(size: int) -> str:
    return "" if size == 1 else f" in a batch of {size}"


def known_images(height: int, width: int) -> NDArray[np.uint8]:
    """Return the known images uint8 (3, h, w, 3): colour gradients with a bright disc, mirrored, and inverted."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (min(height, width) / 4) ** 2
    planes = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    image = np.stack(planes, axis=-1)
    image[disc] = (250, 210, 40)
    first = image.astype(np.uint8)
    return np.stack([first, first[::-1, ::-1], 255 - first])
