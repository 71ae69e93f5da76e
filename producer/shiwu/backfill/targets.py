"""The parts that a backfill has written, and what it has left of others.

A part gets a temporary name first. Only after Redis has recorded it, it gets its own name. So each file with a name of
its own holds rows that no other part holds, whatever crashes. A part whose record Redis has lost, as in a failover, is
deleted, because its rows are written again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from shiwu.backfill.state import Part
from shiwu.parts import Target, TargetError, WrongTarget

TEMPORARY: Final = ".backfill-"
MANIFEST: Final = "manifest.json"
SUMMARY: Final = "summary.json"
PART_NAME: Final = "part-"
_PART: Final = re.compile(rf"{PART_NAME}\d{{5,}}\.[a-z]+")


def prepare(target: Target, parts: Sequence[Part]) -> None:
    """Give recorded parts their names, and delete what was written and is not recorded.

    Raises:
        TargetError: a recorded part is missing.
    """
    found = target.names()
    for part in parts:
        if part.temp and part.temp in found:
            target.publish(part.temp, part.name)
        elif part.name not in found:
            raise TargetError(f"expected the part {part.name} in the output, it is missing; start where it was written")
    recorded = {part.name for part in parts}
    for name in target.names():
        if name.startswith(TEMPORARY) or (_PART.fullmatch(name) and name not in recorded):
            target.delete(name)


def check_empty(target: Target, address: str) -> None:
    """Refuse an output with results of another backfill.

    Raises:
        WrongTarget: it has parts or a manifest.
    """
    found = [name for name in sorted(target.names()) if name.startswith(PART_NAME) or name in {MANIFEST, SUMMARY}]
    if found:
        raise WrongTarget(f"expected an output without results, got {found[0]} in {address}; choose another --out")
