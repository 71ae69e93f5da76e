"""How many cores this process may use: its affinity, and the quota of its cgroups.

A container sees all cores of its node, also where its limit is two of 64. As many threads as there are cores then use
the quota up in a few milliseconds, and all stand still for the rest of each period.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

OWN_CGROUPS: Final = Path("/proc/self/cgroup")
HIERARCHIES: Final = Path("/sys/fs/cgroup")


def usable_cores(*, own_cgroups: Path = OWN_CGROUPS, hierarchies: Path = HIERARCHIES) -> int:
    """Cores of the affinity, or fewer by the least quota of a cgroup; parts of a core count as one.

    Both versions of cgroups are read, see Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst of Linux.
    """
    quotas = [math.ceil(quota) for quota in _quotas(own_cgroups, hierarchies)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _quotas(own_cgroups: Path, hierarchies: Path) -> Iterator[float]:
    for line in _read(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = hierarchies / "cpu" if controllers else hierarchies
        here = mount / path.lstrip("/")
        # In a container the path may be the host's, while the files of its own cgroup lie at the top.
        for folder in (here, *here.parents):
            if folder.is_relative_to(mount):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Cores: microseconds of CPU ÷ microseconds of a period. `max` and -1 are none."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota.strip().isdigit() and period.strip().isdigit() and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
