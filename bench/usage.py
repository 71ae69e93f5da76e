"""CPU time of processes, read from /proc."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shiwu_worker.runtime import proc

PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    cpu_s: float


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds of these processes, user and system; ended processes count 0."""
    return sum(stat.cpu_s for pid in pids if (stat := _stat(pid)) is not None)


def descendants(pid: int) -> list[int]:
    """Return all processes below this one, in any session."""
    parents = {int(path.name): stat.parent for path in PROC.glob("[0-9]*") if (stat := _stat(int(path.name)))}
    found: list[int] = []
    left = [pid]
    while left:
        parent = left.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        left += children
    return found


def families(pids: Sequence[int]) -> list[int]:
    """Return these processes and all below them."""
    return [each for pid in pids for each in (pid, *descendants(pid))]


def _stat(pid: int) -> _Stat | None:
    fields = proc.stat_fields(f"{PROC}/{pid}/stat")
    return _Stat(parent=int(fields[1]), cpu_s=proc.cpu_s(fields)) if fields else None
