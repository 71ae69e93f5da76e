"""Placements of workers: names, ports, files, CPUs."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import pytest

from shiwu_worker.config.settings import Settings
from shiwu_worker.launcher.gpus import UnknownGpu
from shiwu_worker.launcher.placement import Placement, PlacementError, make_placements, plan_placements, share_out
from shiwu_worker.runtime.cpus import cores_of
from shiwu_worker.runtime.nvidia import Gpu

HOST = socket.gethostname()
NEAR = frozenset({0, 1, 2, 3})
FAR = frozenset({4, 5, 6, 7})
GPU0 = Gpu("gpu0", "GPU-a", 0, "GPU-a", NEAR)
GPU1 = Gpu("gpu1", "GPU-b", 1, "GPU-b", FAR)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SHIWU_") or name == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)


def placements(*gpus: Gpu, environment: dict[str, str] | None = None, **settings: object) -> list[Placement]:
    """Placements on a machine with eight CPUs."""
    return make_placements(
        gpus, settings=Settings.model_validate(settings), environment=environment or {}, cpus=NEAR | FAR
    )


def test_each_gpu_has_a_pinned_placement() -> None:
    """By UUID, with names that contain the GPU, on CPUs near it."""
    first, second = placements(GPU0, GPU1)
    assert (first.node, second.node) == (f"shiwu@{HOST}-gpu0", f"shiwu@{HOST}-gpu1")
    assert first.environment == {
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "SHIWU_DEVICE": "cuda",
        "SHIWU_WORKER_NAME": f"{HOST}-gpu0",
    }
    assert (first.cpus, second.cpus) == (NEAR, FAR)


def test_workers_on_one_gpu_share_its_cpus() -> None:
    """Each has a number in its name."""
    made = placements(GPU0, GPU0, GPU1)
    assert [placement.name for placement in made] == ["gpu0-0", "gpu0-1", "gpu1"]
    assert [placement.cpus for placement in made] == [{0, 1}, {2, 3}, FAR]
    assert [placement.environment["CUDA_VISIBLE_DEVICES"] for placement in made] == ["GPU-a", "GPU-a", "GPU-b"]


def test_ports_files_and_names_differ_between_workers(tmp_path: Path) -> None:
    """Ports count up from the setting; 0 is none, and the worker refuses what is not a number."""
    environment = {"SHIWU_HTTP_PORT": "9100"}
    made = placements(GPU0, GPU1, environment=environment, worker_name="w", ready_file=tmp_path / "r", alive_file="/a")
    assert [placement.environment["SHIWU_HTTP_PORT"] for placement in made] == ["9100", "9101"]
    assert [placement.environment["SHIWU_WORKER_NAME"] for placement in made] == ["w-gpu0", "w-gpu1"]
    assert [placement.ready_file for placement in made] == [tmp_path / "r.gpu0", tmp_path / "r.gpu1"]
    assert [placement.environment["SHIWU_READY_FILE"] for placement in made] == [
        str(placement.ready_file) for placement in made
    ]
    assert [placement.environment["SHIWU_ALIVE_FILE"] for placement in made] == ["/a.gpu0", "/a.gpu1"]
    for port in ("0", "", "x", "-1"):
        assert "SHIWU_HTTP_PORT" not in placements(GPU0, environment={"SHIWU_HTTP_PORT": port})[0].environment


def test_cpu_placements_see_no_gpu() -> None:
    """CUDA_VISIBLE_DEVICES is empty."""
    made = placements(Gpu("cpu0", None), Gpu("cpu1", None))
    assert [placement.node for placement in made] == [f"shiwu@{HOST}-cpu0", f"shiwu@{HOST}-cpu1"]
    assert [placement.cpus for placement in made] == [NEAR, FAR]
    assert made[0].environment.items() >= {"CUDA_VISIBLE_DEVICES": "", "SHIWU_DEVICE": "cpu"}.items()


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        ([{0, 1, 2}, {0, 1, 2}], [{0}, {1, 2}]),
        ([{0, 1}, {2, 3}, {0, 1}], [{0}, {2, 3}, {1}]),
        ([{0}, {0}], [{0}, {0}]),
        ([], []),
    ],
)
def test_cpus_are_divided_among_workers(near: list[set[int]], expected: list[set[int]]) -> None:
    """Evenly among workers near the same CPUs; too few CPUs go to each worker."""
    assert (
        share_out([frozenset(cpus) for cpus in near], cores=lambda cpus: [frozenset({n}) for n in sorted(cpus)])
        == expected
    )


def test_cpus_of_one_core_go_to_one_worker(tmp_path: Path) -> None:
    """On usual numbering a core has the CPUs n and n + half; half of the sorted CPUs would be one CPU of each core."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    machine = frozenset(range(8))
    shares = share_out([machine] * 2, cores=partial(cores_of, topology=tmp_path))
    assert shares == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert share_out([machine] * 8, cores=partial(cores_of, topology=tmp_path)) == [{n} for n in range(8)]


def test_device_setting_excludes_gpu_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:1 is one worker; --gpus and --per-gpu contradict it."""
    monkeypatch.setattr("shiwu_worker.launcher.placement.find_gpus", lambda *, visible: [GPU0, GPU1])
    assert [placement.name for placement in plan_placements(Settings(), asked="all", per_gpu=1)] == ["gpu0", "gpu1"]
    for device in ("cuda:1", "cpu"):
        assert plan_placements(Settings(device=device), asked="all", per_gpu=1) == []
    with pytest.raises(PlacementError, match="SHIWU_DEVICE=cuda:1"):
        plan_placements(Settings(device="cuda:1"), asked="0", per_gpu=1)
    with pytest.raises(UnknownGpu):
        plan_placements(Settings(device="cpu"), asked="0", per_gpu=1)
    with pytest.raises(PlacementError, match="--per-gpu"):
        plan_placements(Settings(device="cpu"), asked="all", per_gpu=2)
    assert len(plan_placements(Settings(device="cpu"), asked="cpu:0", per_gpu=2)) == 2
