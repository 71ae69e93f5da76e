# ruff: noqa: N802, N803, D102  the fake has the names of the library
"""Which cards there are: a driver's answers in the shape of nvidia-ml-py, and each form of CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field

import pynvml
import pytest
import structlog

from shiwu_worker.launcher.gpus import Gpu, UnknownGpu, choose_gpus, find_gpus


@dataclass
class FakeCard:
    """What the driver knows of a card. `instances` has None for a place without an instance; no MIG without it."""

    uuid: str
    masks: tuple[int, ...] | None = None
    instances: list[str | None] | None = None
    is_split: bool = True
    is_lost: bool = False


@dataclass
class FakeNvml:
    """The functions of nvidia-ml-py that we call: same names, arguments, kinds of results and errors."""

    gpus: list[FakeCard] = field(default_factory=list)
    has_driver: bool = True
    opened: int = 0

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.opened == 1
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        if self.gpus[index].is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, handle: FakeCard | str) -> str:
        return handle if isinstance(handle, str) else handle.uuid

    def nvmlDeviceGetMigMode(self, device: FakeCard) -> list[int]:
        if device.instances is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(device.is_split), 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeCard) -> int:
        return len(device.instances or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeCard, index: int) -> str:
        instance = (device.instances or [])[index]
        if instance is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return instance

    def nvmlDeviceGetCpuAffinityWithinScope(
        self,
        handle: FakeCard,
        cpuSetSize: int,
        scope: int,
    ) -> ctypes.Array[ctypes.c_ulonglong]:
        assert scope == pynvml.NVML_AFFINITY_SCOPE_NODE
        if handle.masks is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return (ctypes.c_ulonglong * cpuSetSize)(*handle.masks[:cpuSetSize])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """The driver, with no card yet, on a machine with 128 CPUs of which we may use all but the first."""
    fake = FakeNvml()
    for name in (name for name in dir(fake) if name.startswith("nvml")):
        assert callable(getattr(pynvml, name)), "the library has it"
        monkeypatch.setattr(pynvml, name, getattr(fake, name))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1, 128)))
    return fake


@pytest.fixture
def four(nvml: FakeNvml) -> FakeNvml:
    """Two whole cards, one with two MIG instances, and one that could be split and is not."""
    nvml.gpus = [
        FakeCard("GPU-aa11"),
        FakeCard("GPU-aa22"),
        FakeCard("GPU-bb33", instances=["MIG-c1", None, "MIG-c2"]),
        FakeCard("GPU-bb44", instances=[], is_split=False),
    ]
    return nvml


ALL = ["gpu0", "gpu1", "gpu2-mig0", "gpu2-mig2", "gpu3"]


def names(cards: list[Gpu]) -> list[str]:
    """Their names, in order."""
    return [card.name for card in cards]


def test_machine_without_driver_or_gpu_has_no_gpus(nvml: FakeNvml) -> None:
    """Neither is an error."""
    assert find_gpus(visible=None) == []
    nvml.has_driver = False
    assert find_gpus(visible=None) == []
    assert find_gpus(visible="0") == []


def test_gpus_and_mig_instances_are_found(four: FakeNvml) -> None:
    """Instances stand in place of their card; the driver is left as it was."""
    cards = find_gpus(visible=None)
    assert names(cards) == ALL
    assert [card.uuid for card in cards] == ["GPU-aa11", "GPU-aa22", "MIG-c1", "MIG-c2", "GPU-bb44"]
    assert four.opened == 0


def test_gpu_in_mig_mode_without_instances_is_skipped(nvml: FakeNvml) -> None:
    """CUDA shows nothing of it either."""
    nvml.gpus = [FakeCard("GPU-a", instances=[None, None])]
    assert find_gpus(visible=None) == []


def test_lost_gpu_is_skipped_and_logged(nvml: FakeNvml) -> None:
    """The others keep their numbers."""
    nvml.gpus = [FakeCard("GPU-a", is_lost=True), FakeCard("GPU-b")]
    with structlog.testing.capture_logs() as lines:
        assert names(find_gpus(visible=None)) == ["gpu1"]
    assert [(line["event"], line["gpu"]) for line in lines] == [("gpu_skipped", "gpu0")]


def test_near_cpus_are_limited_to_usable_ones(nvml: FakeNvml) -> None:
    """Masks of 64 CPUs each; unknown is empty, and so is a node whose CPUs are others'."""
    nvml.gpus = [FakeCard("GPU-a", (0b1011, 0b1)), FakeCard("GPU-b"), FakeCard("GPU-c", (0b1, 0))]
    assert [card.near_cpus for card in find_gpus(visible=None)] == [{1, 3, 64}, frozenset(), frozenset()]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1", ["gpu0", "gpu1"]),
        ("3, 0", ["gpu3", "gpu0"]),
        ("2", ["gpu2-mig0", "gpu2-mig2"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", ["gpu0"]),
        ("0,4,1", ["gpu0"]),
        ("0,,1", ["gpu0"]),
        ("0,x,1", ["gpu0"]),
        ("1x,0", ["gpu1", "gpu0"]),
        ("0,1,0", []),
        ("GPU-aa22,GPU-aa11", ["gpu1", "gpu0"]),
        ("GPU-aa2", ["gpu1"]),
        ("GPU-aa", []),
        ("GPU-aa1,GPU-no,GPU-aa2", ["gpu0"]),
        ("GPU-aa11,GPU-aa1", []),
        ("GPU-aa11,1", ["gpu0"]),
        ("GPU-bb3", ["gpu2-mig0", "gpu2-mig2"]),
        ("MIG-c2,MIG-c1", ["gpu2-mig2", "gpu2-mig0"]),
        ("MIG-c", []),
        ("MIG-c1,GPU-aa11", ["gpu2-mig0"]),
        ("MIG-c1,MIG-c1", []),
        ("MIG-no", []),
    ],
)
@pytest.mark.usefixtures("four")
def test_gpus_that_cuda_hides_are_hidden(visible: str, expected: list[str]) -> None:
    """The first word that is no card ends the list, a card named twice leaves none."""
    assert names(find_gpus(visible=visible)) == expected


@pytest.mark.parametrize(("visible", "told"), [("0,4", 1), ("0,0", 1), ("", 0), ("-1", 0), ("0,1", 0)])
@pytest.mark.usefixtures("four")
def test_list_that_hides_gpus_by_mistake_is_logged(visible: str, told: int) -> None:
    """But not one that says none."""
    with structlog.testing.capture_logs() as lines:
        find_gpus(visible=visible)
    assert [line["event"] for line in lines] == ["gpus_hidden"] * told


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all", ALL),
        ("1,0", ["gpu1", "gpu0"]),
        ("2", ["gpu2-mig0", "gpu2-mig2"]),
        ("MIG-c2, GPU-aa1", ["gpu2-mig2", "gpu0"]),
        ("cpu:0,cpu:1,3", ["cpu0", "cpu1", "gpu3"]),
    ],
)
@pytest.mark.usefixtures("four")
def test_gpus_are_chosen_by_number_or_uuid(asked: str, expected: list[str]) -> None:
    """By number, UUID or the beginning of one, in the order asked for."""
    assert names(choose_gpus(find_gpus(visible=None), asked)) == expected


@pytest.mark.parametrize(
    "asked", ["4", "0,0", "2,MIG-c1", "GPU-aa", "", "0,", "-1", "gpu0", "cpu", "cpu:0,cpu:0", "CPU:0"]
)
@pytest.mark.usefixtures("four")
def test_wrong_choice_of_gpus_is_an_error(asked: str) -> None:
    """Unlike CUDA's list: who types it wants to know."""
    with pytest.raises(UnknownGpu, match="expected"):
        choose_gpus(find_gpus(visible=None), asked)


@pytest.mark.usefixtures("four")
def test_hidden_gpus_cannot_be_chosen() -> None:
    """The numbers stay nvidia-smi's."""
    cards = find_gpus(visible="1,3")
    assert names(choose_gpus(cards, "3")) == ["gpu3"]
    with pytest.raises(UnknownGpu, match=r"1 \(GPU-aa22\), 3 \(GPU-bb44\), got '0'"):
        choose_gpus(cards, "0")
