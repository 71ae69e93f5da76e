"""The canary: a wrong vector ends the worker, and a device without free memory is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, NonFiniteError
from shiwu_worker.health.canary import OUT_OF_MEMORY_PAUSE_S, Canary, known_images
from shiwu_worker.service.model import load_encoder, make_canary
from shiwu_worker.stages.decode.image_spec import read_image_spec
from tests.support.clock import Clock
from tests.support.pictogram import PICTOGRAM_ZH

GOOD = np.array([0.6, 0.8, 0.0], np.float32)


class Device:
    """A device that returns `vector`, or raises `error`."""

    def __init__(self) -> None:
        self.vector: NDArray[np.float32] = GOOD
        self.error: Exception | None = None
        self.error_kind = DeviceErrorKind.OTHER
        self.calls = 0
        self.sizes: tuple[int, ...] = (1,)
        self.wrong_rows: dict[int, int] = {}
        """Batch size → a row that gets the vector of another image."""
        self.reasons: list[str] = []

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return one vector for each image."""
        self.calls += 1
        if self.error is not None:
            raise self.error
        vectors = np.array([self.vector for _ in pixels])
        if (row := self.wrong_rows.get(len(pixels))) is not None:
            vectors[row] = (1, 0, 0)
        return vectors

    def canary(self, *, every_s: float = 1e-9, clock: Callable[[], float] = time.monotonic) -> Canary:
        """Return a canary that is due at each call, by default."""
        return Canary(
            self.encode,
            images=known_images(4, 4),
            references=np.array([GOOD] * 3),
            sizes=lambda: self.sizes,
            every_s=every_s,
            error_kind=lambda _: self.error_kind,
            on_wrong=self.reasons.append,
            clock=clock,
        )


def test_canary_repeats_after_its_interval() -> None:
    """Not before it, and with 0 seconds never again."""
    device = Device()
    often, once, later = device.canary(), device.canary(every_s=0), device.canary(every_s=1000)
    for _ in range(3):
        for canary in (often, once, later):
            canary.check_if_due()
    assert (device.calls, device.reasons) == (5, [])


@pytest.mark.parametrize(
    ("vector", "why"),
    [
        ([0.8, 0.6, 0.0], "FP32 on the CPU, got 0.96"),
        ([np.nan, 0.8, 0.0], "length 1, got nan"),
        ([np.inf, 0.8, 0.0], "length 1, got inf"),
        ([0.3, 0.4, 0.0], "length 1, got 0.5"),
        ([0.6, 0.8], "shape"),
    ],
)
def test_canary_wrong_vector_ends_the_worker(vector: list[float], why: str) -> None:
    """At the start and later, with its own exit code, after `on_wrong` was called."""
    for is_late in (False, True):
        device = Device()
        canary = device.canary()
        if is_late:
            canary.check_if_due()
        device.vector = np.array(vector, np.float32)
        with pytest.raises(FatalError, match=why) as caught:
            canary.check_if_due()
        assert caught.value.exit_code is ExitCode.CANARY
        assert len(device.reasons) == 1


def test_canary_detects_drift_from_the_first_vector() -> None:
    """The loss of a number format is allowed at the start; a loss that appears later is not."""
    device = Device()
    canary = device.canary()
    device.vector = _rotated(0.15)
    canary.check_if_due()
    canary.check_if_due()
    device.vector = _rotated(0.10)
    with pytest.raises(FatalError, match="the first vector"):
        canary.check_if_due()


def _rotated(angle: float) -> NDArray[np.float32]:
    """The good vector, rotated by an angle in radians towards an orthogonal one."""
    vector: NDArray[np.float32] = (np.cos(angle) * GOOD + np.sin(angle) * np.array([0, 0, 1])).astype(np.float32)
    return vector


def test_canary_tells_apart_lost_device_memory_and_defect() -> None:
    """A lost device has its own exit code, a lack of memory is retried, anything else is a wrong result."""
    device, clock = Device(), Clock()
    canary = device.canary(clock=clock.monotonic)
    device.error, device.error_kind = RuntimeError("CUDA error"), DeviceErrorKind.LOST
    with pytest.raises(FatalError) as caught:
        canary.check_if_due()
    assert (caught.value.exit_code, device.reasons) == (ExitCode.DEVICE, [])
    clock.now_s += 1
    device.error_kind = DeviceErrorKind.OUT_OF_MEMORY
    canary.check_if_due()
    calls = device.calls
    canary.check_if_due()
    assert device.calls == calls, "retried before the pause was over"
    clock.now_s += OUT_OF_MEMORY_PAUSE_S
    device.error = None
    canary.check_if_due()
    assert device.calls == calls + 1
    clock.now_s += 1
    device.error = RuntimeError("out of memory")
    canary.check_if_due()
    assert device.reasons == []
    clock.now_s += OUT_OF_MEMORY_PAUSE_S
    device.error = NonFiniteError("expected finite vectors", (0,))
    with pytest.raises(FatalError, match="expected finite vectors"):
        canary.check_if_due()


@pytest.mark.parametrize("row", [0, 3, 7])
def test_canary_checks_every_row_of_every_size(row: int) -> None:
    """One size after the other; a wrong row of one size is found when its turn comes."""
    device = Device()
    device.sizes = (1, 2, 8)
    canary = device.canary()
    for _ in range(6):
        canary.check_if_due()
    device.wrong_rows = {8: row}
    canary.check_if_due()
    canary.check_if_due()
    with pytest.raises(FatalError, match="in a batch of 8"):
        canary.check_if_due()


def test_known_images_are_constant_and_varied() -> None:
    """Always the same pixels, each image with most levels of each colour, and no two alike."""
    images = known_images(224, 224)
    assert (images.shape, images.dtype) == ((3, 224, 224, 3), np.uint8)
    np.testing.assert_array_equal(images, known_images(224, 224))
    assert all(len(np.unique(image[..., plane])) > 200 for image in images for plane in range(3))
    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_canary_of_a_real_encoder_succeeds(dtype: str) -> None:
    """The reference is computed before the weights are cast; the vector of another image is far from it."""
    folder = PICTOGRAM_ZH
    spec = read_image_spec(folder)
    settings = Settings(dtype=dtype, max_batch=1, torch_threads=1)
    encoder = load_encoder(settings, folder, spec)
    reasons: list[str] = []
    make_canary(settings, encoder, on_wrong=reasons.append).check_if_due()
    assert reasons == []
    noise = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, 3), np.uint8)
    assert float(encoder.encode(noise)[0] @ encoder.known_vectors[0]) < 0.98
