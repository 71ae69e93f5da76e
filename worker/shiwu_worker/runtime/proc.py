"""Reads the state of processes, threads and CPUs from Linux's /proc. See `man 5 proc`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

NOT_RUNNING: Final = frozenset("TtZXx")
"""States of a process that is stopped, traced, or has exited."""
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12
"""Places in a `stat` file, counted from the state."""


def read_text(path: Path) -> str:
    """The text of a file in /proc or /sys; empty where it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether a process exists and is not stopped."""
    fields = stat_fields(f"/proc/{pid}/stat")
    return bool(fields) and fields[_STATE] not in NOT_RUNNING


def thread_cpu_s(pid: int, thread: int) -> float:
    """CPU seconds of one thread of a process since its start; 0 if it has ended."""
    return cpu_s(stat_fields(f"/proc/{pid}/task/{thread}/stat"))


def cpu_flags() -> frozenset[str]:
    """The words that describe the first CPU, with its instruction sets, such as `avx512_bf16`."""
    return frozenset(read_text(Path("/proc/cpuinfo")).partition("\n\n")[0].split())


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where /proc does not tell."""
    pages = read_text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def highest_descriptor() -> int:
    """The highest open file descriptor of this process."""
    return max(map(int, os.listdir("/proc/self/fd")))


def stat_fields(path: str) -> list[str]:
    """The fields of a `stat` file from the state on; empty where the process or thread has ended."""
    # The name stands before the state in brackets, and may contain spaces and brackets.
    return read_text(Path(path)).rpartition(")")[2].split()


def cpu_s(fields: Sequence[str]) -> float:
    """CPU seconds, of user and system, in the fields of a `stat` file; 0 without fields."""
    return (int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / _TICKS_PER_S if fields else 0.0
