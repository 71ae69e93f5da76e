"""The size of files and functions, the length of test names, and the pinned versions of a fresh installation."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("producer", "worker", "tests", "bench", "demo", "drill", "recipes", "docker")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
"""Without the docstring."""
TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))
OTHER_FLAGS = {
    # Celery's, redis-py's and S3's names.
    *("ignore_result", "ignore_subscribe_messages", "inuse_connections", "push_request", "requester_pays"),
    # Names that users see: of the client's API, of options and settings, and of fields that are printed or stored.
    *("stop_when_idle", "show_all", "as_json", "task_events", "tells_refusals", "usable", "same_first", "retryable"),
    *("accept", "by_source", "calibrated", "coalesce", "named_only", "thin", "exclusive", "hidden", "unknown"),
    # What a caller asks for, or reports.
    *("active", "available", "choose_largest", "count_waiting", "counts", "default", "may_be_cluster", "may_compile"),
    *("must_decode", "splits_batches", "value"),
}
"""Names of flags in `producer` and `worker` that do not begin with is_ or has_."""
MAX_TEST_NAME = 60
"""Length of the longest name of a test."""


def long_functions(path: Path) -> Iterator[str]:
    """Yield the functions of a file that are over the limit, as `file:line name: lines`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"


def test_the_sources_are_found() -> None:
    """In every folder that holds code."""
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FOLDERS)
    assert {"client.py", "pipeline.py"} <= {path.name for path in SOURCES}


def test_files_stay_short() -> None:
    """A file has at most MAX_FILE_LINES lines."""
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_fit_on_a_screen() -> None:
    """A function has at most MAX_FUNCTION_LINES lines."""
    assert [line for path in SOURCES for line in long_functions(path)] == []


def flags(path: Path) -> Iterator[str]:
    """Yield the arguments and fields of type bool in a file whose names do not begin with is_ or has_."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        named: dict[str, ast.expr | None] = {}
        if isinstance(node, ast.FunctionDef):
            named = {each.arg: each.annotation for each in (*node.args.args, *node.args.kwonlyargs)}
        elif isinstance(node, ast.AnnAssign):
            named = {ast.unparse(node.target).rpartition(".")[2]: node.annotation}
        for name, annotation in named.items():
            if annotation is not None and ast.unparse(annotation) in {"bool", "bool | None"}:
                yield name


def test_flags_begin_with_is_or_has() -> None:
    """Except for those in OTHER_FLAGS, and options of commands and settings, which have the names that users write."""
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in {"producer", "worker"}]
    with_options = {"__main__.py", "settings.py", "source_settings.py"}
    inner = [path for path in paths if path.parent.name != "cli" and path.name not in with_options]
    found = {name for path in inner for name in flags(path) if not re.match(r"_*(?:is|has)_", name)}
    assert found - OTHER_FLAGS == set()


def test_test_names_are_short() -> None:
    """A test's name has at most MAX_TEST_NAME characters; details stand in its docstring."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in TEST_FILES}
    names = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > len(TEST_FILES)
    assert [name for name in names if len(name.rpartition(" ")[2]) > MAX_TEST_NAME] == []


def test_tests_share_helpers_through_support_only() -> None:
    """No file imports a test file: what two of them need stands in a module without tests."""
    pattern = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+", re.M)
    python_files = (ROOT / "tests").rglob("*.py")
    importers = [str(path.relative_to(ROOT)) for path in python_files if pattern.search(path.read_text("utf-8"))]
    assert importers == []


def pins() -> list[str]:
    """Return the lines of constraints.txt that pin a package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_constraints_are_exact_and_portable() -> None:
    """Every line pins one version of a public index, without local suffix, path or editable install."""
    assert [line for line in pins() if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.]*", line)] == []


def test_every_dependency_is_pinned() -> None:
    """The versions of direct dependencies do not depend on the day of the installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {re.split(r"[\[<>=!~;@ ]", line)[0].lower() for group in groups for line in group}
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins()}
    assert {"torch", "celery", "pytest"} <= asked
    assert asked - pinned == set()
