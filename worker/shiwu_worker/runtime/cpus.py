"""How many cores this process may use: its affinity, and the quota of its cgroups.

A container sees all cores of its node, even if its limit is two of 64. With one thread per visible core, the quota of
each period is used up in a few milliseconds, and no thread runs for the rest of the period.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shiwu_worker.runtime.proc import read_text

OWN_CGROUPS: Final = Path("/proc/self/cgroup")
HIERARCHIES: Final = Path("/sys/fs/cgroup")
CPUINFO: Final = Path("/proc/cpuinfo")
TOPOLOGY: Final = Path("/sys/devices/system/cpu")


def usable_cores(*, own_cgroups: Path = OWN_CGROUPS, hierarchies: Path = HIERARCHIES) -> int:
    """The number of cores in the affinity mask, or the smallest CPU quota of a cgroup, rounded up, if that is less.

    Reads both versions of cgroups, see Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst of Linux.
    """
    quotas = [math.ceil(quota) for quota in _quotas(own_cgroups, hierarchies)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def cpu_model(*, cpuinfo: Path = CPUINFO) -> str:
    """Return the model of the first CPU, such as `AMD EPYC 9354`; empty where Linux does not tell."""
    for line in read_text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return ""


def cores_of(cpus: frozenset[int], *, topology: Path = TOPOLOGY) -> list[frozenset[int]]:
    """Group CPUs by their core, in the order of each core's first CPU; a CPU of an unknown core is one by itself.

    With hyper-threading a core has two CPUs, usually with numbers far apart, see
    Documentation/ABI/stable/sysfs-devices-system-cpu of Linux.
    """
    cores: dict[str, set[int]] = {}
    for cpu in sorted(cpus):
        siblings = read_text(topology / f"cpu{cpu}/topology/thread_siblings_list").strip()
        cores.setdefault(siblings or f"cpu{cpu}", set()).add(cpu)
    return [frozenset(core) for core in cores.values()]


def _quotas(own_cgroups: Path, hierarchies: Path) -> Iterator[float]:
    for line in read_text(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = hierarchies / "cpu" if controllers else hierarchies
        own = mount / path.lstrip("/")
        # In a container the path may be that of the host, while the files of the cgroup are at the top of the mount.
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """The quota in cores: microseconds of CPU ÷ microseconds of a period. `max` and -1 mean no quota."""
    quota, _, period = read_text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
    if quota.strip().isdigit() and period.strip().isdigit() and int(period):
        yield int(quota) / int(period)
