"""Exit codes of a model that cannot be loaded."""

from __future__ import annotations

import pytest
import torch

from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.encode.encoder import Encoder
from tests.support.pictogram import PICTOGRAM_ZH


@pytest.mark.parametrize(
    ("text", "error_code", "expected"),
    [
        ("CUDA error: uncorrectable ECC error encountered", 214, ExitCode.DEVICE),
        ("CUDA error: unspecified launch failure", 719, ExitCode.DEVICE),
        ("CUDA error: no kernel image is available for execution on the device", 209, ExitCode.MODEL),
        ("CUDA error: out of memory", 2, ExitCode.MODEL),
    ],
)
def test_device_that_fails_at_the_start_is_named(
    monkeypatch: pytest.MonkeyPatch, text: str, error_code: int, expected: ExitCode
) -> None:
    """Files of the model are no cause then, and a launcher asks the driver about the GPU."""
    error = torch.AcceleratorError(text)
    error.error_code = error_code  # type: ignore[attr-defined]  # set by torch's C++ code

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Encoder, "__init__", fail)
    with pytest.raises(FatalError, match=text) as caught:
        load_encoder(Settings(), PICTOGRAM_ZH, read_image_spec(PICTOGRAM_ZH))
    assert caught.value.exit_code is expected
