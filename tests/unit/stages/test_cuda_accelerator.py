"""What the accelerator of CUDA asks of torch: on which streams, and what is left after a failed capture."""

from __future__ import annotations

import pytest
import torch

from shiwu_worker.stages.encode.accelerator import CudaAccelerator
from tests.support.fake_cuda import FakeCuda

DEFAULT, COMPUTE, COPIES = 0, 1, 2


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A driver."""
    made = FakeCuda()
    made.install(monkeypatch)
    return made


def test_capture_is_made_on_the_compute_stream(cuda: FakeCuda) -> None:
    """Where the passes before it ran, so that libraries have their workspaces of this stream."""
    accelerator = CudaAccelerator(torch.device("cuda", 0))
    raw = torch.ones(2)

    def work(raw: torch.Tensor) -> torch.Tensor:
        cuda.note("work")
        assert torch.is_inference_mode_enabled()
        return raw + 1

    assert accelerator.capture(work, raw, pool=None).output.tolist() == [2, 2]
    assert ("work", COMPUTE) in cuda.calls
    assert cuda.current.number == DEFAULT


@pytest.mark.parametrize("is_own_error", [True, False], ids=["of the model", "at the end"])
def test_failed_capture_leaves_the_stream_of_the_thread(cuda: FakeCuda, is_own_error: bool) -> None:
    """torch leaves its own one current then, and all later work of this thread would run on it."""
    accelerator = CudaAccelerator(torch.device("cuda", 0))
    cuda.is_capture_void = True

    def work(raw: torch.Tensor) -> torch.Tensor:
        if is_own_error:
            raise RuntimeError("operation not permitted when stream is capturing")
        return raw

    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        accelerator.capture(work, torch.ones(2), pool=None)
    assert cuda.current.number == DEFAULT
    assert not torch.is_inference_mode_enabled()


def test_fresh_memory_is_ready_for_every_stream(cuda: FakeCuda) -> None:
    """It is filled on the stream of the thread; a copy on another stream could otherwise be overwritten by zeros."""
    accelerator = CudaAccelerator(torch.device("cuda", 0))
    assert accelerator.allocate((2, 3), torch.uint8).shape == (2, 3)
    assert cuda.calls[-2:] == [("zeros", DEFAULT), ("synchronize", DEFAULT)]


def test_copies_and_computation_have_their_own_streams(cuda: FakeCuda) -> None:
    """For the block, on this thread only."""
    accelerator = CudaAccelerator(torch.device("cuda", 0))
    with accelerator.copying():
        assert cuda.current.number == COPIES
        with accelerator.computing():
            assert cuda.current.number == COMPUTE
        assert cuda.current.number == COPIES
    assert cuda.current.number == DEFAULT
