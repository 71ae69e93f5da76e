"""A known picture through the real encode path, at the start and every few minutes: is the device right?

Memory that flips bits, a driver gone bad or weights overwritten give answers that look like answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np
import structlog
from numpy.typing import NDArray

from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, WrongVectors

log: Any = structlog.get_logger()
MIN_COSINE_TO_REFERENCE: Final = 0.98
"""Cosine to the reference in FP32 on the CPU, which a narrower number format may miss by a little."""
MIN_COSINE_TO_FIRST: Final = 0.999
"""Cosine to the answer at the start: the same program on the same device gives more than 0.99999."""
LENGTH_SLACK: Final = 1e-3
OUT_OF_MEMORY_PAUSE_S: Final = 5.0
"""After a time at which the device was out of memory."""


class Canary:
    """Asks the encoder for the known picture. Used by one thread at a time: by who starts the worker, then by `encode`.

    Args:
        encode: pixels uint8 (1, h, w, 3) → vectors float32 (1, d), as jobs are encoded.
        pixels: the known picture, uint8 (1, h, w, 3).
        reference: its unit vector float32 (d,) as it was computed elsewhere than on the device.
        every_s: 0 asks once.
        trouble: what an error of `encode` means.
        on_wrong: told what is wrong before the error is raised.
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
    ) -> None:
        self._encode = encode
        self._pixels = pixels
        self._reference = reference
        self._every_s = every_s
        self._error_kind = error_kind
        self._on_wrong = on_wrong
        self._first: NDArray[np.float32] | None = None
        self._due_s = 0.0

    def check_if_due(self) -> None:
        """Encode the picture where its time has come.

        Raises:
            FatalError: with ExitCode.CANARY for a wrong answer, with ExitCode.DEVICE when the device is lost.
        """
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._every_s if self._every_s else float("inf")
        try:
            vectors = self._encode(self._pixels)
        except WrongVectors as error:
            self._fail(str(error))
        except Exception as error:  # border: what the device's library raises is not known
            error_kind = self._error_kind(error)
            if error_kind is DeviceErrorKind.LOST:
                raise FatalError(ExitCode.DEVICE, f"the device failed on the known picture: {error}") from error
            if error_kind is DeviceErrorKind.OUT_OF_MEMORY:
                # Others may have the memory for a moment; that says nothing of how the device computes.
                log.warning("canary_skipped", reason="the device was out of memory", retry_in_s=OUT_OF_MEMORY_PAUSE_S)
                self._due_s = now_s + OUT_OF_MEMORY_PAUSE_S
                return
            self._fail(f"{type(error).__name__}: {error!s:.200}")
        self._check(vectors)

    def _check(self, vectors: NDArray[np.float32]) -> None:
        if vectors.shape != (1, len(self._reference)):
            self._fail(f"expected a vector of shape {(1, len(self._reference))}, got {vectors.shape}")
        vector = vectors[0]
        # Each test is put so that NaN fails it.
        length = float(np.linalg.norm(vector))
        if not abs(length - 1) <= LENGTH_SLACK:
            self._fail(f"expected a vector of length 1, got {length:.4g}")
        cosine = float(vector @ self._reference)
        if not cosine >= MIN_COSINE_TO_REFERENCE:
            self._fail(f"expected a cosine of {MIN_COSINE_TO_REFERENCE} or more to FP32 on the CPU, got {cosine:.4f}")
        if self._first is None:
            self._first = vector.copy()
        cosine_to_first = float(vector @ self._first)
        if not cosine_to_first >= MIN_COSINE_TO_FIRST:
            self._fail(
                f"expected a cosine of {MIN_COSINE_TO_FIRST} or more to the start's answer, got {cosine_to_first:.4f}"
            )
        log.debug("canary", cosine=round(cosine, 6), to_first=round(cosine_to_first, 6))

    def _fail(self, wrong: str) -> NoReturn:
        self._on_wrong(wrong)
        raise FatalError(ExitCode.CANARY, f"the known picture got a wrong answer: {wrong}")


def known_image(height: int, width: int) -> NDArray[np.uint8]:
    """Pixels uint8 (1, h, w, 3), always the same: slopes of colour with a bright disc, so that every layer has work."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (min(height, width) / 4) ** 2
    planes = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    picture = np.stack(planes, axis=-1)
    picture[disc] = (250, 210, 40)
    return picture.astype(np.uint8)[np.newaxis]
