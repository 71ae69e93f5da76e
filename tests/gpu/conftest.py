"""Each check of this folder runs on CUDA with four models, and with a tiny one on a stand-in for it on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from tests.support.device_targets import (
    CUDA_MODELS,
    FAKE_MODELS,
    LittleMemory,
    Target,
    open_target,
    release,
    vector_width,
)

TARGETS = [
    *(pytest.param((name, True), marks=pytest.mark.gpu, id=f"cuda-{name}") for name in CUDA_MODELS),
    *(pytest.param((name, False), id=f"fake-{name}") for name in FAKE_MODELS),
]


@pytest.fixture(params=TARGETS)
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    """A model on a device. On the stand-in, work is done later, in an order that is drawn."""
    name, is_cuda = request.param
    if is_cuda and not torch.cuda.is_available():
        pytest.fail("expected a CUDA device; `make test` deselects these tests")
    made = open_target(name, is_cuda=is_cuda, folder=tmp_path_factory.mktemp("model"))
    if not is_cuda:
        seeds, width = count(), vector_width(made.folder)
        monkeypatch.setattr(
            "shiwu_worker.stages.encode.encoder.open_accelerator",
            lambda _: LittleMemory(seed=next(seeds), width=width),
        )
    yield made
    release()
