"""The mutation run: which faults it makes, and that each module's tests are those of the module."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.__main__ import TESTS, chosen, failed_tests
from tests.mutants.operators import edits_of
from tests.mutants.zygote import ROOT

SOURCE = '''
"""A docstring."""
from typing import TYPE_CHECKING, Final
if TYPE_CHECKING:
    x = 1 + 2
WAIT_S: Final = 5.0
MOST: Final = 3
LONG_S: Final = 4 * WAIT_S

def f(a: int, b: bool = False) -> int:
    """Another."""
    log.info("said", count=a + 1)
    if a < MOST and not b:
        raise ValueError(f"got {a + 1}")
    for _ in range(a):
        continue
    self.x = a + 1
    call(a)
    closed.wait(RETRY_PAUSE_S)
    closed.wait(a)
    return min(a, "text" + b)
'''


def changed(line: str) -> set[str]:
    """What the faults make of one line of the source above."""
    before = SOURCE.splitlines()
    found = set()
    for edit in edits_of(SOURCE):
        after = edit.apply(SOURCE).splitlines()
        found |= {new.strip() for old, new in zip(before, after, strict=True) if old != new and old.strip() == line}
    return found


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("x = 1 + 2", set()),
        ("WAIT_S: Final = 5.0", set()),
        ("MOST: Final = 3", set()),
        ("LONG_S: Final = 4 * WAIT_S", set()),
        ("def f(a: int, b: bool = False) -> int:", {"def f(a: int, b: bool = True) -> int:"}),
        ('log.info("said", count=a + 1)', set()),
        (
            "if a < MOST and not b:",
            {
                "if (a <= MOST) and not b:",
                "if (a < MOST or not b):",
                "if a < MOST and (b):",
                "if (not (a < MOST and (not b))):",
            },
        ),
        ('raise ValueError(f"got {a + 1}")', {"pass"}),
        ("continue", {"pass"}),
        ("self.x = a + 1", {"pass", "self.x = (a - 1)", "self.x = a + 2", "self.x = a + 0"}),
        ("call(a)", {"pass"}),
        ("closed.wait(RETRY_PAUSE_S)", set()),
        ("closed.wait(a)", {"pass"}),
        ('return min(a, "text" + b)', {"return None", 'return max(a, "text" + b)'}),
    ],
)
def test_faults_of_a_line(line: str, faults: set[str]) -> None:
    """Texts, annotations, log lines, named numbers and pauses are left alone."""
    assert changed(line) == faults


def test_sample_depends_on_its_seed_alone() -> None:
    """So that a run can be repeated."""
    modules = ["worker/shiwu_worker/pipeline/admission.py"]
    assert chosen(10, seed=1, modules=modules) == chosen(10, seed=1, modules=modules)
    assert chosen(10, seed=1, modules=modules) != chosen(10, seed=2, modules=modules)
    everything = chosen(10**6, seed=1, modules=modules)
    assert len(everything) == len(set(everything)) > 30


def test_failed_tests_are_read_from_the_summary() -> None:
    """With what they say, or without."""
    log = "FAILED tests/a.py::test_b[c d] - assert 1\nERROR tests/x.py\n1 failed\n"
    assert failed_tests(log) == ["tests/a.py::test_b[c d]", "tests/x.py"]


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules that a file imports, also within functions; for `from a import b`, `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def file_of(module: str) -> Path | None:
    """The file of a module of this project."""
    for top in (ROOT / "producer", ROOT / "worker", ROOT):
        base = top / module.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def reached(path: Path) -> set[str]:
    """The modules that a test file imports, itself or by others."""
    found: set[str] = set()
    waiting = list(imported(path))
    while waiting:
        name = waiting.pop()
        file = file_of(name) if name not in found and name.split(".")[0] in {"shiwu", "shiwu_worker", "tests"} else None
        if file is not None:
            found.add(name)
            waiting += imported(file)
    return found


@pytest.mark.parametrize("module", TESTS)
def test_tests_of_a_module_exist_and_import_it(module: str) -> None:
    """Each file by itself, or one of a folder."""
    assert (ROOT / module).is_file()
    name = module.split("/", 1)[1].removesuffix(".py").replace("/", ".")
    for test in TESTS[module]:
        files = [ROOT / test] if test.endswith(".py") else sorted((ROOT / test).glob("test_*.py"))
        assert any(name in reached(file) for file in files), f"{test} does not import {name}"
