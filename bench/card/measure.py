"""Measures of a step: named calls that return figures. One that fails is recorded, and the next one runs."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

Measure = tuple[str, Callable[[], Any]]
"""A name, and what returns the figures as JSON values."""
Measures = Iterator[Measure]
NEEDS_CUDA: Final = "needs CUDA"


class Skipped(Exception):
    """A measure that this machine cannot run; the text says what it needs."""


def need_cuda() -> None:
    """Raise Skipped where there is no CUDA device."""
    import torch  # noqa: PLC0415 only where a measure needs it

    if not torch.cuda.is_available():
        raise Skipped(NEEDS_CUDA)


def run(measures: Measures, folder: Path) -> bool:
    """Run all measures; return whether none failed."""
    found: dict[str, Any] = {}
    has_failed = False
    for name, measure in measures:
        began_s = time.monotonic()
        try:
            found[name] = measure()
        except Skipped as reason:
            found[name] = f"skipped: {reason}"
        except Exception as error:  # noqa: BLE001 border: the other measures must still run
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            has_failed = True
        print(f"{name}: {json.dumps(found[name], default=str)[:500]} ({time.monotonic() - began_s:.1f} s)", flush=True)
        text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
        (folder / "figures.json").write_text(text, encoding="utf-8")
    return not has_failed
