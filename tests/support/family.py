"""A process and what it started, from /proc: their ids, ages, CPU time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from shiwu_worker.runtime.proc import stat_fields

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """Process ids of the direct children; none where the process is gone."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # a thread or process that ended meanwhile
            continue
    return found


def family(pid: int) -> list[int]:
    """The process, its children, and theirs."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def loaders_of(pid: int) -> list[int]:
    """Process ids of a worker's loaders: the children of its children."""
    return [loader for fork_server in children(pid) for loader in children(fork_server)]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, the state first; empty when the process is gone."""
    return stat_fields(f"/proc/{pid}/stat")


def lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    stat = _stat(pid)
    return bool(stat) and stat[0] != "Z"


def age_s(pid: int) -> float:
    """Seconds since the process was started; 0 when it is gone."""
    stat = _stat(pid)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / _TICKS_A_SECOND if stat else 0.0


def cpu_s(pids: Iterable[int]) -> float:
    """Seconds of CPU that these processes, and their children that ended, have used; 0 for those that are gone."""
    stats = [stat for stat in map(_stat, pids) if stat]
    return sum(int(field) for stat in stats for field in stat[11:15]) / _TICKS_A_SECOND


def rss_bytes(pid: int) -> int:
    """Memory of the process that is in RAM; 0 when it is gone."""
    stat = _stat(pid)
    return int(stat[21]) * _PAGE_BYTES if stat else 0
