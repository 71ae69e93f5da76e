"""Where workers are put: names, ports, files, CPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shiwu_worker.config.settings import Settings
from shiwu_worker.launcher.gpus import Gpu, UnknownGpu
from shiwu_worker.launcher.placement import Placement, PlacementError, make_placements, plan_placements, share_out

HOST = socket.gethostname()
NEAR = frozenset({0, 1, 2, 3})
FAR = frozenset({4, 5, 6, 7})
GPU0 = Gpu("gpu0", "GPU-a", 0, "GPU-a", NEAR)
GPU1 = Gpu("gpu1", "GPU-b", 1, "GPU-b", FAR)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SHIWU_") or name == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)


def places(*cards: Gpu, environment: dict[str, str] | None = None, **settings: object) -> list[Placement]:
    """Places on a machine with eight CPUs."""
    return make_placements(
        cards, settings=Settings.model_validate(settings), environment=environment or {}, cpus=NEAR | FAR
    )


def test_each_gpu_has_a_pinned_placement() -> None:
    """By UUID, with names that tell the card, on CPUs near it."""
    first, second = places(GPU0, GPU1)
    assert (first.node, second.node) == (f"shiwu@{HOST}-gpu0", f"shiwu@{HOST}-gpu1")
    assert first.environment == {
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "SHIWU_DEVICE": "cuda",
        "SHIWU_WORKER_NAME": f"{HOST}-gpu0",
    }
    assert (first.cpus, second.cpus) == (NEAR, FAR)


def test_workers_on_one_gpu_share_its_cpus() -> None:
    """And have a number each."""
    made = places(GPU0, GPU0, GPU1)
    assert [place.name for place in made] == ["gpu0-0", "gpu0-1", "gpu1"]
    assert [place.cpus for place in made] == [{0, 1}, {2, 3}, FAR]
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in made] == ["GPU-a", "GPU-a", "GPU-b"]


def test_ports_files_and_names_differ_between_workers(tmp_path: Path) -> None:
    """A port counts up from the one that was set; 0 is none, and what is no number is the worker's to refuse."""
    environment = {"SHIWU_HTTP_PORT": "9100"}
    made = places(GPU0, GPU1, environment=environment, worker_name="w", ready_file=tmp_path / "r", alive_file="/a")
    assert [place.environment["SHIWU_HTTP_PORT"] for place in made] == ["9100", "9101"]
    assert [place.environment["SHIWU_WORKER_NAME"] for place in made] == ["w-gpu0", "w-gpu1"]
    assert [place.ready_file for place in made] == [tmp_path / "r.gpu0", tmp_path / "r.gpu1"]
    assert [place.environment["SHIWU_READY_FILE"] for place in made] == [str(place.ready_file) for place in made]
    assert [place.environment["SHIWU_ALIVE_FILE"] for place in made] == ["/a.gpu0", "/a.gpu1"]
    for port in ("0", "", "x", "-1"):
        assert "SHIWU_HTTP_PORT" not in places(GPU0, environment={"SHIWU_HTTP_PORT": port})[0].environment


def test_cpu_placements_see_no_gpu() -> None:
    """Workers on it see no card at all."""
    made = places(Gpu("cpu0", None), Gpu("cpu1", None))
    assert [place.node for place in made] == [f"shiwu@{HOST}-cpu0", f"shiwu@{HOST}-cpu1"]
    assert [place.cpus for place in made] == [NEAR, FAR]
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
    """Evenly among those near the same; too few are everybody's."""
    assert share_out([frozenset(cpus) for cpus in near]) == expected


def test_device_setting_excludes_gpu_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:1 is one worker; cards beside it are a contradiction, as is a share of no card."""
    monkeypatch.setattr("shiwu_worker.launcher.placement.find_gpus", lambda *, visible: [GPU0, GPU1])
    assert [place.name for place in plan_placements(Settings(), asked="all", per_gpu=1)] == ["gpu0", "gpu1"]
    for device in ("cuda:1", "cpu"):
        assert plan_placements(Settings(device=device), asked="all", per_gpu=1) == []
    with pytest.raises(PlacementError, match="SHIWU_DEVICE=cuda:1"):
        plan_placements(Settings(device="cuda:1"), asked="0", per_gpu=1)
    with pytest.raises(UnknownGpu):
        plan_placements(Settings(device="cpu"), asked="0", per_gpu=1)
    with pytest.raises(PlacementError, match="--per-gpu"):
        plan_placements(Settings(device="cpu"), asked="all", per_gpu=2)
    assert len(plan_placements(Settings(device="cpu"), asked="cpu:0", per_gpu=2)) == 2
