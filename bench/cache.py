"""Where big things that are made once are kept, outside of the repository: ~/.cache/shiwu-bench."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`SHIWU_BENCH_CACHE`, else shiwu-bench in the user's cache."""
    own = os.environ.get("SHIWU_BENCH_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shiwu-bench"
    base.mkdir(parents=True, exist_ok=True)
    return base


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name; `make` fills it the first time. It is there whole or not at all."""
    final = cache_folder() / name
    if final.is_dir():
        return final
    half = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        make(half)
        half.chmod(0o755)
        if not final.is_dir():  # another process may have written the same file first
            half.rename(final)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return final
