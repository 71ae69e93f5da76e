"""No loader of transformers may run code of a checkpoint, or ask on standard input whether it may."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for name in ("worker", "producer", "recipes", "bench", "demo") for path in (ROOT / name).rglob("*.py")]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: str(path.relative_to(ROOT)))
def test_loaders_of_transformers_trust_no_code(path: Path) -> None:
    """Without `trust_remote_code=False` transformers asks, and a `y` on standard input runs the code."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if call.func.attr != "from_pretrained" or not ast.unparse(call.func.value).startswith("Auto"):
            continue
        given = {option.arg: ast.unparse(option.value) for option in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{path.name}:{call.lineno}"
