"""Bytecode of this project made once for all processes of a run, whatever PYTHONDONTWRITEBYTECODE says.

pytest rewrites the assertions of a file when it imports it, eight CPU seconds for all files, and each process of
pytest-xdist imports all of them at the same time as the others. Here each process rewrites a part before it imports
any; it then finds the others' in `__pycache__`, and rewrites itself what is not there yet.
"""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest
from _pytest.assertion.rewrite import (
    PYC_TAIL,
    _read_pyc,
    _rewrite_test,
    _write_pyc,
    assertstate_key,
    get_cache_dir,
    try_makedirs,
)


def rewrite_part(config: pytest.Config, folder: Path, *, number: int, count: int) -> None:
    """Rewrite every `count`th test file below the folder from this number on, unless it is rewritten already."""
    state = config.stash.get(assertstate_key, None)
    if state is None:  # --assert=plain
        return
    for path in sorted(folder.rglob("test_*.py"))[number::count]:
        cached = get_cache_dir(path) / f"{path.stem}{PYC_TAIL}"
        if _read_pyc(path, cached) is None and try_makedirs(cached.parent):
            source, code = _rewrite_test(path, config)
            _write_pyc(state, code, source, cached)


def compile_sources(root: Path) -> None:
    """Compile what some hundred processes of the tests import each."""
    for name in ("producer", "worker", "demo", "bench", "tests/support"):
        compileall.compile_dir(root / name, quiet=2)
