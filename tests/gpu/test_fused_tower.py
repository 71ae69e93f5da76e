"""What makes the image tower of a GPU faster leaves its vectors as they are."""

from __future__ import annotations

import numpy as np

from shiwu_worker.config.types import FUSIONS
from tests.support.device_targets import Target


def test_steps_leave_the_vectors_as_they_are(target: Target) -> None:
    """In FP32, in every batch size, as graphs; models that a step does not know are encoded as they are."""
    plain, fused = (target.encoder(dtype="float32", batch_sizes=(1, 4), fusions=each) for each in ((), FUSIONS))
    for count in (1, 3, 4):
        pixels = target.noise(count)
        np.testing.assert_allclose(fused.encode(pixels), plain.encode(pixels), atol=1e-4)
