"""What NVML tells about the device of a worker, and about a broken one."""

from __future__ import annotations

import pytest

from shiwu_worker.runtime.nvidia import driver_version, fault_of, gpu_models, instance_uuid
from tests.support.fake_nvml import FakeGpu, FakeNvml


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """The driver without a GPU."""
    fake = FakeNvml()
    fake.install(monkeypatch)
    return fake


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 0, "MIG-c1"), (None, 1, None), ("MIG-c9", 0, "MIG-c9"), ("MIG-a, MIG-b", 1, "MIG-b"), ("0", 0, "MIG-c1")],
)
def test_instance_of_a_container_has_its_own_uuid(
    nvml: FakeNvml, visible: str | None, index: int, expected: str | None
) -> None:
    """Kubernetes gives a container one MIG instance and sets no CUDA_VISIBLE_DEVICES; CUDA tells the GPU's UUID."""
    nvml.gpus = [FakeGpu("GPU-a", instances=[None, "MIG-c1"])]
    assert instance_uuid(index, visible=visible) == expected


def test_whole_gpu_is_no_instance(nvml: FakeNvml) -> None:
    """Nor does one of several instances without a number in CUDA_VISIBLE_DEVICES tell which."""
    nvml.gpus = [FakeGpu("GPU-a")]
    assert instance_uuid(0, visible=None) is None
    nvml.gpus = [FakeGpu("GPU-a", instances=["MIG-c1", "MIG-c2"])]
    assert instance_uuid(0, visible=None) is None


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (FakeGpu("GPU-a"), None),
        (FakeGpu("GPU-a", remapped=(1, 1, False, False)), None),
        (FakeGpu("GPU-a", remapped=(0, 1, True, False)), "replaced at the next reset"),
        (FakeGpu("GPU-a", remapped=(0, 9, True, True)), "more broken rows than it can replace"),
        (FakeGpu("GPU-a", is_lost=True), "fallen off the bus"),
        (FakeGpu("GPU-other"), "does not list it any more"),
    ],
    ids=["no remapping", "healthy", "pending", "failed", "lost", "gone"],
)
def test_fault_of_a_gpu_names_what_has_to_be_done(nvml: FakeNvml, gpu: FakeGpu, expected: str | None) -> None:
    """Rows that were replaced are no fault; what only a reset or a replacement cures is."""
    nvml.gpus = [gpu]
    fault = fault_of("GPU-a")
    assert (fault is None) if expected is None else (fault is not None and expected in fault)
    assert nvml.opened == 0


def test_machine_without_driver_has_no_fault_and_no_version(nvml: FakeNvml) -> None:
    """The worker runs on a CPU there."""
    assert driver_version() == "570.86.10"
    nvml.has_driver = False
    assert (fault_of("GPU-a"), driver_version(), instance_uuid(0, visible=None)) == (None, None, None)


def test_models_of_gpus_and_instances_are_named_once(nvml: FakeNvml) -> None:
    """A tune file is valid on every machine with the same ones."""
    nvml.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c", instances=["MIG-c1"])]
    assert gpu_models() == ("NVIDIA H200", "NVIDIA H200 MIG 1g.18gb")
