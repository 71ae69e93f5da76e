"""The canary: encodes a known image at the start and every few minutes, and checks the vector.

Flipped bits in device memory, a faulty driver or overwritten weights give wrong vectors without an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NoReturn

import numpy as np
import structlog
from numpy.typing import NDArray
from structlog.typing import FilteringBoundLogger

from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, WrongVectors

log: FilteringBoundLogger = structlog.get_logger()
MIN_COSINE_TO_REFERENCE: Final = 0.98
"""Lowest cosine to the reference in FP32 on the CPU; narrower number formats differ from it slightly."""
MIN_COSINE_TO_FIRST: Final = 0.999
"""Lowest cosine to the vector at the start; the same program on the same device gives more than 0.99999."""
MAX_LENGTH_ERROR: Final = 1e-3
OUT_OF_MEMORY_PAUSE_S: Final = 5.0
"""Pause before the next try after the device was out of memory."""


class Canary:
    """Encodes the known image and checks its vector. One thread at a time: the starting thread, then `encode`.

    Args:
        encode: pixels uint8 (1, h, w, 3) → vectors float32 (1, d), on the path that jobs take.
        pixels: the known image, uint8 (1, h, w, 3).
        reference: its unit vector float32 (d,), computed in FP32 on the CPU.
        every_s: interval of the checks; 0 checks once.
        error_kind: what an error of `encode` means.
        on_wrong: called with the reason before the error is raised.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
        *,
        pixels: NDArray[np.uint8],
        reference: NDArray[np.float32],
        every_s: float,
        error_kind: Callable[[BaseException], DeviceErrorKind],
        on_wrong: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._encode = encode
        self._pixels = pixels
        self._reference = reference
        self._every_s = every_s
        self._error_kind = error_kind
        self._on_wrong = on_wrong
        self._first: NDArray[np.float32] | None = None
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
        try:
            vectors = self._encode(self._pixels)
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
        self._check(vectors)

    def _check(self, vectors: NDArray[np.float32]) -> None:
        if vectors.shape != (1, len(self._reference)):
            self._fail(f"expected a vector of shape {(1, len(self._reference))}, got {vectors.shape}")
        vector = vectors[0]
        # NaN fails every one of these comparisons.
        length = float(np.linalg.norm(vector))
        if not abs(length - 1) <= MAX_LENGTH_ERROR:
            self._fail(f"expected a vector of length 1, got {length:.4g}")
        cosine = float(vector @ self._reference)
        if not cosine >= MIN_COSINE_TO_REFERENCE:
            self._fail(f"expected a cosine of {MIN_COSINE_TO_REFERENCE} or more to FP32 on the CPU, got {cosine:.4f}")
        if self._first is None:
            self._first = vector.copy()
        cosine_to_first = float(vector @ self._first)
        if not cosine_to_first >= MIN_COSINE_TO_FIRST:
            self._fail(
                f"expected a cosine of {MIN_COSINE_TO_FIRST} or more to the first vector, got {cosine_to_first:.4f}"
            )
        log.debug("canary", cosine=round(cosine, 6), to_first=round(cosine_to_first, 6))

    def _fail(self, wrong: str) -> NoReturn:
        self._on_wrong(wrong)
        raise FatalError(ExitCode.CANARY, f"the health-check image got a wrong result: {wrong}")


def known_image(height: int, width: int) -> NDArray[np.uint8]:
    """Return the pixels uint8 (1, h, w, 3) of the known image: colour gradients with a bright disc, always the same."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (min(height, width) / 4) ** 2
    planes = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    image = np.stack(planes, axis=-1)
    image[disc] = (250, 210, 40)
    return image.astype(np.uint8)[np.newaxis]
