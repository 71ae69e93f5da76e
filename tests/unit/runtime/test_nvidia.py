"""What NVML tells about the device of a worker, and about a broken one."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from shiwu_worker.runtime.nvidia import device_uuid, driver_version, fault_of, gpu_models, list_gpus, why_no_gpu
from shiwu_worker.telemetry.gpu_monitor import GpuMonitor, GpuState
from tests.support.fake_nvml import FakeGpu, FakeNvml


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """The driver without a GPU."""
    fake = FakeNvml()
    fake.install(monkeypatch)
    return fake


@pytest.mark.parametrize(
    ("reported", "visible", "index", "expected"),
    [
        ("b", None, 0, "MIG-b1"),
        ("b1", None, 0, "MIG-b1"),
        ("b", "1", 0, "MIG-b1"),
        ("b1", "MIG-b", 0, "MIG-b1"),
        ("c", "MIG-c2", 0, "MIG-c2"),
        ("c2", "MIG-c", 0, "MIG-c2"),
        ("c2", "MIG-GPU-c/2/0", 0, "MIG-c2"),
        ("c2", "2", 0, "MIG-c2"),
        ("c", "2", 0, "GPU-c"),
        ("a", "GPU-a", 0, "GPU-a"),
        ("a", "0", 0, "GPU-a"),
        ("a", "1,0", 1, "GPU-a"),
        ("a", None, 0, "GPU-a"),
        ("x", None, 0, "GPU-x"),
    ],
)
def test_device_of_cuda_has_the_uuid_of_nvml(
    nvml: FakeNvml, reported: str, visible: str | None, index: int, expected: str
) -> None:
    """A whole GPU, one with one instance, and one with two, of which CUDA reports the UUID or that of their GPU."""
    nvml.gpus = [
        FakeGpu("GPU-a"),
        FakeGpu("GPU-b", instances=[None, "MIG-b1"]),
        FakeGpu("GPU-c", instances=["MIG-c1", "MIG-c2"]),
    ]
    assert device_uuid(reported, index=index, visible=visible) == expected


@pytest.mark.parametrize("visible", [None, "0", "GPU-a"])
def test_whole_gpu_is_not_taken_for_the_only_instance(nvml: FakeNvml, visible: str | None) -> None:
    """Another GPU of the machine has it; their memory and load were mixed up."""
    nvml.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b", instances=["MIG-b1"])]
    assert device_uuid("a", index=0, visible=visible) == "GPU-a"


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (FakeGpu("GPU-a"), None),
        (FakeGpu("GPU-a", remapped=(1, 1, False, False)), None),
        (FakeGpu("GPU-a", remapped=(0, 1, True, False)), None),
        (FakeGpu("GPU-a", retires_pages=False), None),
        (FakeGpu("GPU-a", retires_pages=True), "left out after the next reset"),
        (FakeGpu("GPU-a", remapped=(0, 9, True, True)), "more broken rows than it can replace"),
        (FakeGpu("GPU-a", recovery_action=None, remapped=(0, 1, True, False)), None),
        (FakeGpu("GPU-a", recovery_action=pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET), "has to be reset"),
        (FakeGpu("GPU-a", recovery_action=pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT), "has to be rebooted"),
        (FakeGpu("GPU-a", recovery_action=pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P), None),
        (FakeGpu("GPU-a", recovery_action=pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET), "when no program uses it"),
        (FakeGpu("GPU-a", is_lost=True), "fallen off the bus"),
        (FakeGpu("GPU-other"), "does not list it any more"),
    ],
    ids=[
        *["no remapping", "healthy", "pending", "healthy T4", "T4", "failed", "no action known"],
        *["reset", "reboot", "P2P", "drain", "lost", "gone"],
    ],
)
def test_fault_of_a_gpu_names_what_has_to_be_done(nvml: FakeNvml, gpu: FakeGpu, expected: str | None) -> None:
    """Rows that were replaced, or will be, are no fault; what only a reset or a replacement cures is."""
    nvml.gpus = [gpu]
    fault = fault_of("GPU-a")
    assert (fault is None) if expected is None else (fault is not None and expected in fault)
    assert nvml.opened == 0


def test_lost_gpu_is_no_fault_of_the_others(nvml: FakeNvml) -> None:
    """NVML finds none by its UUID then; the others keep their workers and their metrics."""
    nvml.gpus = [FakeGpu("GPU-a", is_lost=True), FakeGpu("GPU-b"), FakeGpu("GPU-c", instances=[None, "MIG-c1"])]
    assert fault_of("GPU-b") is None
    assert "fallen off the bus" in str(fault_of("GPU-a"))
    for uuid, expected in {"GPU-b": GpuState(3, 8, 0.4), "MIG-c1": GpuState(3, 8, 0.4), "GPU-a": None}.items():
        nvml.opened = 0
        monitor = GpuMonitor(uuid)
        monitor.update()
        assert monitor.state() == expected


def test_machine_without_driver_has_no_fault_and_no_version(nvml: FakeNvml) -> None:
    """The worker runs on a CPU there."""
    assert driver_version() == "570.86.10"
    nvml.has_driver = False
    assert (fault_of("GPU-a"), driver_version(), device_uuid("a", index=0, visible=None)) == (None, None, "GPU-a")


def test_models_of_gpus_and_instances_are_named_once(nvml: FakeNvml) -> None:
    """A tune file is valid on every machine with the same ones."""
    nvml.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c", instances=["MIG-c1"])]
    assert gpu_models() == ("NVIDIA H200", "NVIDIA H200 MIG 1g.18gb")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
        (pynvml.NVML_ERROR_UNKNOWN, "does not answer (Unknown Error)"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "does not answer (Insufficient Permissions)"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, None),
    ],
)
def test_installed_driver_that_does_not_answer_is_a_fault(nvml: FakeNvml, error: int, expected: str | None) -> None:
    """As after an update of the host's driver, or of a container whose devices systemd took away."""
    nvml.gpus, nvml.init_error = [FakeGpu("GPU-a")], error
    reason = why_no_gpu()
    assert (reason is None) if expected is None else (reason is not None and expected in reason)
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("vendor", "kind", "is_fault"),
    [
        ("0x10de", "0x030200", True),
        ("0x10de", "0x030000", True),
        ("0x10de", "0x040300", False),
        ("0x1af4", "0x030000", False),
    ],
    ids=["data center", "screen", "its sound", "another maker"],
)
def test_driver_that_is_not_loaded_is_a_fault_beside_a_gpu(
    nvml: FakeNvml, tmp_path: Path, vendor: str, kind: str, *, is_fault: bool
) -> None:
    """An image may contain the library, and runs on machines without a GPU too."""
    nvml.init_error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert (why_no_gpu(pci=tmp_path) is not None) == is_fault
    assert why_no_gpu(pci=tmp_path / "none") is None


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([FakeGpu("GPU-a", is_lost=True)], "gpu0: it has fallen off the bus"),
        ([FakeGpu("GPU-a", instances=[None])], "gpu0: it is in MIG mode, and there is no instance"),
        ([FakeGpu("GPU-a", is_lost=True), FakeGpu("GPU-b")], None),
        ([FakeGpu("GPU-a", is_forbidden=True)], None),
        ([], None),
    ],
    ids=["lost", "no instance", "another one works", "of others", "none"],
)
def test_gpus_that_cannot_be_used_are_explained(nvml: FakeNvml, gpus: list[FakeGpu], expected: str | None) -> None:
    """A worker that restarts after it lost its only GPU must know that there is one."""
    nvml.gpus = gpus
    reason = why_no_gpu()
    assert (reason is None) if expected is None else (reason is not None and expected in reason)
    assert nvml.opened == 0


def test_gpus_that_cannot_be_counted_are_a_fault(nvml: FakeNvml) -> None:
    """And no traceback in the launcher."""
    nvml.gpus, nvml.count_error = [FakeGpu("GPU-a")], pynvml.NVML_ERROR_UNKNOWN
    assert list_gpus() == []
    assert "cannot be counted" in str(why_no_gpu())
