"""Every console of the product prints texts of other parties as they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("producer", "worker") for path in (ROOT / folder).rglob("*.py"))


def consoles(tree: ast.AST) -> list[ast.Call]:
    """Calls that make a console of rich, except those for a progress bar on standard error."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in {"Console", "_Console"}]
    return [call for call in named if not any(option.arg == "stderr" for option in call.keywords)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_consoles_switch_markup_off(path: Path) -> None:
    """Otherwise a reference with `[/red]` ends the command, and markup hides text."""
    for call in consoles(ast.parse(path.read_text(encoding="utf-8"))):
        off = {
            option.arg for option in call.keywords if isinstance(option.value, ast.Constant) and not option.value.value
        }
        assert {"markup", "emoji", "highlight"} <= off, f"{path.name}:{call.lineno}"
