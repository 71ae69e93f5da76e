"""The hand-written pages: links lead somewhere, and lines fit on a screen."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shiwu_worker.config.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "worker" / "shiwu_worker"
GENERATED = {"docs/settings.md", "docs/errors.md"}
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "helm" / "shiwu" / "README.md"]
WRITTEN = [page for page in PAGES if str(page.relative_to(ROOT)) not in GENERATED]
MAX_COLUMNS = 120
OUTPUT = {"bench/out", "build/card-wheels", "build/site"}
"""Folders that commands make."""
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_DEFINITION = re.compile(r"^\[[^\]]+\]: (\S+)$", re.M)


def name(page: Path) -> str:
    """The path of a page as tests print it."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a page without fenced and indented code."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def anchors(page: Path) -> set[str]:
    """The anchors that forges give to the headings of a page."""
    found: set[str] = set()
    for _, line in prose(page):
        if heading := re.match(r"#+ (.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            numbered = (f"{anchor}-{number}" for number in range(1, 100))
            found.add(anchor if anchor not in found else next(one for one in numbered if one not in found))
    return found


def columns(line: str) -> int:
    """The width of a line on a terminal: East Asian characters take two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_resolve(page: Path) -> None:
    """Every linked file exists, and every anchor is a heading of its page."""
    text = "\n".join(line for _, line in prose(page))
    broken = []
    for link in [*_LINK.findall(text), *_DEFINITION.findall(text)]:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_lines_of_prose_fit_in_120_columns(page: Path) -> None:
    """Tables, code and lines that hold a long address are exempt."""
    long = [
        f"{name(page)}:{number}: {columns(line)} columns"
        for number, line in prose(page)
        if columns(line) > MAX_COLUMNS and not line.startswith("|") and not re.search(r"https?://\S{60}", line)
    ]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    """A path in backticks that begins with a folder of the project, or with a package of the worker."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    packages = {path.name for path in WORKER.iterdir() if path.is_dir()}
    missing = []
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", "\n".join(line for _, line in prose(page))):
        first = path.split("/")[0]
        root = ROOT if first in folders else WORKER if first in packages else None
        if root is not None and path not in OUTPUT and not (root / path).exists():
            missing.append(path)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_whole(page: Path) -> None:
    """Rows follow a line of dashes without a gap, otherwise they are shown as text with bars."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [number for number, line in prose(page) if line.startswith("|")]
    first = [number for number in rows if number - 1 not in rows]
    assert [number for number in first if not re.fullmatch(r"\|[-:| ]+\|", lines[number])] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of_data_can_be_read(page: Path) -> None:
    """YAML and JSON that is copied from a page."""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if language == "yaml":
            assert all(yaml.safe_load_all(text))
        elif language == "json":
            assert json.loads(text)


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.parent == ROOT / "docs"], ids=name)
def test_settings_have_their_prefix(page: Path) -> None:
    """A name that is copied into an environment works."""
    settings = {field.upper() for field in Settings.model_fields}
    bare = set(re.findall(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")))
    assert bare & settings == set()
