"""What processes have used of the machine, read from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    cpu_s: float


def cpu_s(pids: Iterable[int]) -> float:
    """Seconds of CPU that these processes have used, user and system; those that are gone count nothing."""
    return sum(stat.cpu_s for pid in pids if (stat := _stat(pid)) is not None)


def descendants(pid: int) -> list[int]:
    """The processes below this one, whatever sessions they have made for themselves."""
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
    """These processes and all below them."""
    return [each for pid in pids for each in (pid, *descendants(pid))]


def _stat(pid: int) -> _Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The name, in brackets, may hold blanks and brackets itself.
    fields = text.rpartition(")")[2].split()
    return _Stat(parent=int(fields[1]), cpu_s=(int(fields[11]) + int(fields[12])) / TICKS_PER_S)
