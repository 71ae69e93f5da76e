"""Cache for large generated files, outside the repository: ~/.cache/shiwu-bench."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return `SHIWU_BENCH_CACHE`, or shiwu-bench in the user's cache folder."""
    own = os.environ.get("SHIWU_BENCH_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shiwu-bench"
    base.mkdir(parents=True, exist_ok=True)
    return base


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of this name; `make` fills it the first time. It exists complete or not at all."""
    final = cache_folder() / name
    if final.is_dir():
        return final
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        if not final.is_dir():  # another process may have been first
            unfinished.rename(final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final
