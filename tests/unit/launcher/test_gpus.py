"""Discovery of GPUs: replies of a driver in the form of nvidia-ml-py, and all forms of CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import os

import pytest
import structlog

from shiwu_worker.launcher.gpus import UnknownGpu, choose_gpus, find_gpus
from shiwu_worker.runtime.nvidia import Gpu
from tests.support.fake_nvml import FakeGpu, FakeNvml


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """The driver without a GPU, on a machine with 128 CPUs of which the process may use all but the first."""
    fake = FakeNvml()
    fake.install(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1, 128)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    return fake


@pytest.fixture
def four(nvml: FakeNvml) -> FakeNvml:
    """Two GPUs without MIG, one with two MIG instances, and one that could be split and is not."""
    nvml.gpus = [
        FakeGpu("GPU-aa11"),
        FakeGpu("GPU-aa22"),
        FakeGpu("GPU-bb33", instances=["MIG-c1", None, "MIG-c2"]),
        FakeGpu("GPU-bb44", instances=[], is_split=False),
    ]
    return nvml


ALL = ["gpu0", "gpu1", "gpu2-mig0", "gpu2-mig2", "gpu3"]


def names(gpus: list[Gpu]) -> list[str]:
    """Their names, in order."""
    return [gpu.name for gpu in gpus]


def test_machine_without_driver_or_gpu_has_no_gpus(nvml: FakeNvml) -> None:
    """Neither is an error."""
    assert find_gpus(visible=None) == []
    nvml.has_driver = False
    assert find_gpus(visible=None) == []
    assert find_gpus(visible="0") == []


def test_gpus_and_mig_instances_are_found(four: FakeNvml) -> None:
    """Instances replace their GPU; the library is shut down afterwards."""
    gpus = find_gpus(visible=None)
    assert names(gpus) == ALL
    assert [gpu.uuid for gpu in gpus] == ["GPU-aa11", "GPU-aa22", "MIG-c1", "MIG-c2", "GPU-bb44"]
    assert four.opened == 0


def test_gpu_in_mig_mode_without_instances_is_skipped(nvml: FakeNvml) -> None:
    """CUDA does not show it either."""
    nvml.gpus = [FakeGpu("GPU-a", instances=[None, None])]
    assert find_gpus(visible=None) == []


def test_lost_gpu_is_skipped_and_logged(nvml: FakeNvml) -> None:
    """The others keep their numbers."""
    nvml.gpus = [FakeGpu("GPU-a", is_lost=True), FakeGpu("GPU-b")]
    with structlog.testing.capture_logs() as lines:
        assert names(find_gpus(visible=None)) == ["gpu1"]
    assert [(line["event"], line["gpu"]) for line in lines] == [("gpu_skipped", "gpu0")]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["gpu1", "gpu3"]), ("0,1", ["gpu1", "gpu3"]), ("1", ["gpu3"]), ("GPU-d", ["gpu3"]), ("3", [])],
)
def test_gpus_that_a_cgroup_denies_are_not_counted(nvml: FakeNvml, visible: str | None, expected: list[str]) -> None:
    """As in a job of Slurm: NVML counts them all, and CUDA numbers those that are allowed from 0."""
    nvml.gpus = [FakeGpu(f"GPU-{name}", is_forbidden=name in "ac") for name in "abcd"]
    with structlog.testing.capture_logs() as lines:
        gpus = find_gpus(visible=visible)
    assert names(gpus) == expected
    assert [line["event"] for line in lines] == (["gpus_hidden"] if visible == "3" else [])
    if visible is None:
        assert names(choose_gpus(gpus, "3")) == ["gpu3"]


def test_near_cpus_are_limited_to_usable_ones(nvml: FakeNvml) -> None:
    """Masks of 64 CPUs each; empty if unknown, or if the process may use none of them."""
    nvml.gpus = [FakeGpu("GPU-a", (0b1011, 0b1)), FakeGpu("GPU-b"), FakeGpu("GPU-c", (0b1, 0))]
    assert [gpu.near_cpus for gpu in find_gpus(visible=None)] == [{1, 3, 64}, frozenset(), frozenset()]


def test_mask_of_cpus_has_room_for_all_cpus(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on the first CPUs of a large machine asks with a mask of the machine's size."""
    sizes: list[int] = []

    def affinity(handle: FakeGpu, size: int, scope: int) -> list[int]:
        sizes.append(size)
        return [0b11] + [0] * (size - 1)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("pynvml.nvmlDeviceGetCpuAffinityWithinScope", affinity)
    nvml.gpus = [FakeGpu("GPU-a")]
    assert [gpu.near_cpus for gpu in find_gpus(visible=None)] == [{0, 1}]
    assert sizes == [2]


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
    """The first word that names no GPU ends the list, and a repeated GPU empties it."""
    assert names(find_gpus(visible=visible)) == expected


@pytest.mark.parametrize(("visible", "lines_logged"), [("0,4", 1), ("0,0", 1), ("", 0), ("-1", 0), ("0,1", 0)])
@pytest.mark.usefixtures("four")
def test_list_that_hides_gpus_by_mistake_is_logged(visible: str, lines_logged: int) -> None:
    """But not one that asks for none."""
    with structlog.testing.capture_logs() as lines:
        find_gpus(visible=visible)
    assert [line["event"] for line in lines] == ["gpus_hidden"] * lines_logged


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
    """By number, UUID or prefix of one, in the order of the option."""
    assert names(choose_gpus(find_gpus(visible=None), asked)) == expected


@pytest.mark.parametrize(
    "asked", ["4", "0,0", "2,MIG-c1", "GPU-aa", "", "0,", "-1", "gpu0", "cpu", "cpu:0,cpu:0", "CPU:0"]
)
@pytest.mark.usefixtures("four")
def test_wrong_choice_of_gpus_is_an_error(asked: str) -> None:
    """Unlike in CUDA's list, so that the operator sees it."""
    with pytest.raises(UnknownGpu, match=r"^--gpus: expected"):
        choose_gpus(find_gpus(visible=None), asked)


def test_choice_without_gpus_says_that_none_is_visible() -> None:
    """In place of an empty list."""
    with pytest.raises(UnknownGpu, match=r"^--gpus: expected cpu:N or all, because no GPU is visible, got '3'$"):
        choose_gpus([], "3")


@pytest.mark.usefixtures("four")
def test_hidden_gpus_cannot_be_chosen() -> None:
    """The numbers stay nvidia-smi's."""
    gpus = find_gpus(visible="1,3")
    assert names(choose_gpus(gpus, "3")) == ["gpu3"]
    with pytest.raises(UnknownGpu, match=r"1 \(GPU-aa22\), 3 \(GPU-bb44\), got '0'"):
        choose_gpus(gpus, "0")
