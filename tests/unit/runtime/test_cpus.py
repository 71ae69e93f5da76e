"""How many cores a process may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from shiwu_worker.runtime.cpus import usable_cores

CASES: Mapping[str, tuple[str, Mapping[str, str], int]] = {
    "no cgroups": ("", {}, 64),
    "no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    "a limit": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "a part of a core": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "less than a core": ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
    "more than there are": ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
    "of one above": (
        "0::/kubepods/pod1/c1\n",
        {"kubepods/pod1/c1/cpu.max": "max 100000", "kubepods/pod1/cpu.max": "300000 100000", "cpu.max": "max 100000"},
        3,
    ),
    "the least": (
        "0::/a/b\n",
        {"a/b/cpu.max": "800000 100000", "a/cpu.max": "400000 100000"},
        4,
    ),
    "the host's path": ("0::/kubepods/pod1/c1\n", {"cpu.max": "500000 100000"}, 5),
    "version 1": (
        "9:name=systemd:/x\n4:memory:/x\n3:cpuset:/x\n1:cpu,cpuacct:/x\n0::/\n",
        {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "version 1, no limit": (
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        64,
    ),
    "nonsense": ("0::/\n", {"cpu.max": "many 0\n"}, 64),
    "no period": ("0::/\n", {"cpu.max": "100000 0\n"}, 64),
}


@pytest.mark.parametrize(("own", "files", "expected"), CASES.values(), ids=CASES)
def test_usable_cores_follow_the_quota_of_cgroups(
    own: str, files: Mapping[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quota of the own cgroup or of one above it, in both versions; never less than one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cores(own_cgroups=tmp_path / "own", hierarchies=tmp_path / "fs") == expected


def test_usable_cores_follow_the_affinity() -> None:
    """The affinity of this process, before and after it is limited to one core."""
    before = os.sched_getaffinity(0)
    assert 1 <= usable_cores() <= len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
