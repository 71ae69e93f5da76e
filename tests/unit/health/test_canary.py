"""The known picture: who answers it wrong has to end, and who can't answer now is asked again."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError, NonFiniteError
from shiwu_worker.health.canary import Canary, known_image
from shiwu_worker.service.model import load_encoder, make_canary
from shiwu_worker.stages.decode.image_spec import read_image_spec

GOOD = np.array([0.6, 0.8, 0.0], np.float32)


class Device:
    """Answers with `vector`, or raises `error`."""

    def __init__(self) -> None:
        self.vector: NDArray[np.float32] = GOOD
        self.error: Exception | None = None
        self.error_kind = DeviceErrorKind.OTHER
        self.asked = 0
        self.said: list[str] = []

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One vector."""
        self.asked += 1
        if self.error is not None:
            raise self.error
        return np.array([self.vector for _ in pixels])

    def canary(self, *, every_s: float = 1e-9) -> Canary:
        """One that is due each time, unless told otherwise."""
        return Canary(
            self.encode,
            pixels=known_image(4, 4),
            reference=GOOD,
            every_s=every_s,
            error_kind=lambda _: self.error_kind,
            on_wrong=self.said.append,
        )


def test_the_right_answer_is_asked_for_again_when_its_time_has_come() -> None:
    """And not before; with 0 seconds once only."""
    device = Device()
    often, once, later = device.canary(), device.canary(every_s=0), device.canary(every_s=1000)
    for _ in range(3):
        for canary in (often, once, later):
            canary.check_if_due()
    assert (device.asked, device.said) == (5, [])


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
def test_a_wrong_answer_ends_the_worker(vector: list[float], why: str) -> None:
    """At the start and later, with its own exit code, and the probes are told first."""
    for is_late in (False, True):
        device = Device()
        canary = device.canary()
        if is_late:
            canary.check_if_due()
        device.vector = np.array(vector, np.float32)
        with pytest.raises(FatalError, match=why) as caught:
            canary.check_if_due()
        assert caught.value.exit_code is ExitCode.CANARY
        assert len(device.said) == 1


def test_a_device_that_drifts_is_wrong_before_it_is_far_from_the_reference() -> None:
    """What a number format loses is allowed once and for all; what is lost later is not."""
    device = Device()
    canary = device.canary()
    device.vector = _turned(0.15)
    canary.check_if_due()
    canary.check_if_due()
    device.vector = _turned(0.10)
    with pytest.raises(FatalError, match="start's answer"):
        canary.check_if_due()


def _turned(angle: float) -> NDArray[np.float32]:
    """The good vector, turned towards one at right angles to it."""
    vector: NDArray[np.float32] = (np.cos(angle) * GOOD + np.sin(angle) * np.array([0, 0, 1])).astype(np.float32)
    return vector


def test_what_the_device_raises_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost: the device's own exit code. Short of memory: no sign, also at the start. Anything else: wrong."""
    monkeypatch.setattr("shiwu_worker.health.canary.OUT_OF_MEMORY_PAUSE_S", 0.0)
    device = Device()
    canary = device.canary()
    device.error, device.error_kind = RuntimeError("CUDA error"), DeviceErrorKind.LOST
    with pytest.raises(FatalError) as caught:
        canary.check_if_due()
    assert (caught.value.exit_code, device.said) == (ExitCode.DEVICE, [])
    device.error_kind = DeviceErrorKind.OUT_OF_MEMORY
    canary.check_if_due()
    device.error = None
    canary.check_if_due()
    device.error = RuntimeError("out of memory")
    canary.check_if_due()
    assert device.said == []
    device.error = NonFiniteError("expected finite vectors", (0,))
    with pytest.raises(FatalError, match="expected finite vectors"):
        canary.check_if_due()


def test_the_picture_is_known() -> None:
    """Always the same, with every level of every colour near."""
    picture = known_image(224, 224)
    assert (picture.shape, picture.dtype) == ((1, 224, 224, 3), np.uint8)
    np.testing.assert_array_equal(picture, known_image(224, 224))
    assert all(len(np.unique(picture[..., plane])) > 200 for plane in range(3))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_real_encoder_answers_as_fp32_on_the_cpu_does(dtype: str) -> None:
    """The reference is taken before the weights are cast; another picture is far from it."""
    folder = model_folder(None)
    spec = read_image_spec(folder)
    settings = Settings(dtype=dtype, max_batch=1, torch_threads=1)
    encoder = load_encoder(settings, folder, spec)
    said: list[str] = []
    make_canary(settings, encoder, spec, on_wrong=said.append).check_if_due()
    assert said == []
    noise = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, 3), np.uint8)
    assert float(encoder.encode(noise)[0] @ encoder.known_vectors[0]) < 0.98
