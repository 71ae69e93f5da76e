"""Searches the memory of another process for texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 16 << 20
MAX_REGION_BYTES: Final = 512 << 20
"""Larger regions are reserved address space, not memory that is used."""


def found_in_memory(pid: int, texts: Iterable[str]) -> set[str]:
    """Those of these ASCII texts that stand in the readable memory of a process, whatever it uses the memory for."""
    left = {text: text.encode() for text in texts}
    found: set[str] = set()
    overlap = max(map(len, left.values()), default=1) - 1
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for begin, end in _regions(pid):
            for at in range(begin, end, CHUNK_BYTES):
                try:
                    memory.seek(at)
                    chunk = memory.read(min(CHUNK_BYTES + overlap, end - at))
                except OSError:
                    continue  # a region of the kernel, which cannot be read
                found |= {text for text, data in left.items() if data in chunk}
    return found


def _regions(pid: int) -> list[tuple[int, int]]:
    regions = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights = line.split()[:2]
        begin, end = (int(part, 16) for part in place.split("-"))
        if rights.startswith("r") and end - begin < MAX_REGION_BYTES:
            regions.append((begin, end))
    return regions
