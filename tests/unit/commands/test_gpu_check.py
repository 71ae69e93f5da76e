"""What `shiwu-worker --check` says of GPUs and their driver."""

from __future__ import annotations

import pynvml
import pytest

from shiwu_worker.commands.gpu_check import check_gpus
from shiwu_worker.config.settings import Settings
from tests.support.fake_nvml import FakeGpu, FakeNvml

H200 = FakeGpu("GPU-a")


@pytest.mark.parametrize(
    ("nvml", "text", "warnings"),
    [
        (FakeNvml(gpus=[H200]), "gpu0 (GPU-a); driver 570.86.10; torch 2.13.0+cu130 is built for CUDA 13.0", []),
        (
            FakeNvml(gpus=[H200, FakeGpu("GPU-b", recovery_action=1, instances=["MIG-b1", "MIG-b2"])]),
            "gpu0 (GPU-a), gpu1-mig0 (MIG-b1), gpu1-mig1 (MIG-b2); driver",
            ["gpu1: it has to be reset"],
        ),
        (
            FakeNvml(gpus=[FakeGpu("GPU-a", is_lost=True), FakeGpu("GPU-b"), FakeGpu("GPU-c", is_forbidden=True)]),
            "gpu1 (GPU-b); driver",
            ["gpu0: it has fallen off the bus; it gets no worker"],
        ),
        (FakeNvml(has_driver=False), "none is found; the driver is absent", []),
        (
            FakeNvml(init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
            "none is found; the driver is absent",
            ["NVIDIA's driver does not answer (RM has detected an NVML/RM version mismatch.)"],
        ),
        (FakeNvml(gpus=[FakeGpu("GPU-a", is_lost=True)]), "none is found", ["gpu0: it has fallen off the bus"]),
    ],
    ids=["one", "instances", "one lost", "no driver", "no answer", "lost"],
)
def test_check_names_driver_cuda_gpus_and_faults(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, text: str, warnings: list[str]
) -> None:
    """The versions are what a driver that is too old is found by."""
    nvml.install(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    said, found = check_gpus(Settings())
    assert (text in said, list(found)) == (True, warnings), said


def test_check_asks_for_no_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with SHIWU_DEVICE=cpu nor with GPUs hidden."""
    FakeNvml(gpus=[H200]).install(monkeypatch)
    assert check_gpus(Settings(device="cpu"))[0].startswith("none is used")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_gpus(Settings())[0].startswith("none is used")
