"""A pytest plugin for environments without torch: leaves out the files that import it, and says which."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
HEAVY: Final = frozenset({"torch", "transformers"})
LEFT_OUT: list[str] = []


def imported(path: Path) -> set[str]:
    """Modules that a file imports at its top, type-only imports left out."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def needs_torch(module: str, seen: set[str]) -> bool:
    """Whether importing a module of this repository imports torch or transformers."""
    if module.partition(".")[0] in HEAVY:
        return True
    if module in seen:
        return False
    seen.add(module)
    for base in (ROOT, ROOT / "worker", ROOT / "producer"):
        path = base.joinpath(*module.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if file.exists():
            return any(needs_torch(name, seen) for name in imported(file))
    return False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a test file that needs torch, directly or through what it imports."""
    del config
    if not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
        return None
    module = ".".join(collection_path.relative_to(ROOT).with_suffix("").parts)
    if needs_torch(module, set()) or "start_worker" in collection_path.read_text(encoding="utf-8"):
        LEFT_OUT.append(collection_path.name)
        return True
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    names = ", ".join(sorted(set(LEFT_OUT)))
    terminalreporter.write_line(f"left out, because they need torch: {names or 'none'}")
