"""The documentation site: builds strictly, shows every page, loads nothing from elsewhere, and can be searched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.support import chromium, site_scripts
from tests.support.chromium import Browser
from tests.support.processes import ROOT, clean_environment
from tests.support.waiting import wait_until

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Tag → attribute whose address a browser loads without being asked."""
MAX_BUILD_S = 120
BLOCKS = ("blockquote", "h2", "h3", "img", "li", "pre", "table", "td", "tr")
SEARCH = """(text) => {
  const open = document.querySelector("#__search"), query = document.querySelector("[data-md-component=search-query]");
  if (!open.checked) open.click();
  query.value = text;
  query.dispatchEvent(new Event("input", {bubbles: true}));
  query.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true, key: "a"}));
}"""
FOUND = "[...document.querySelectorAll('.md-search-result__item > a')].map((found) => found.getAttribute('href'))"


class _Loads(HTMLParser):
    """Collects the addresses that a page loads, and counts its tags in the article."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: Counter[str] = Counter()
        self._is_article = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._is_article |= tag == "article"
        if self._is_article:
            self.tags[tag] += 1
        if address := values.get(LOADS.get(tag, "")):
            self.addresses.append(address)
        self.addresses += re.findall(r"url\(([^)]+)\)", values.get("style") or "")

    def handle_endtag(self, tag: str) -> None:
        self._is_article &= tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", "docs/site/mkdocs.yml", "-d", str(folder)],
        cwd=ROOT,
        env=clean_environment({"NO_MKDOCS_2_WARNING": "1"}),
        capture_output=True,
        text=True,
        timeout=MAX_BUILD_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(page: Path) -> _Loads:
    """What a built page loads and shows."""
    found = _Loads()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def sources() -> Iterator[Path]:
    """The Markdown files that the site shows."""
    for pattern in ("*.md", "docs/**/*.md", "helm/shiwu/README.md", "recipes/README.md"):
        yield from ROOT.glob(pattern)


def built(source: Path, site: Path) -> Path:
    """The page that is made of a Markdown file."""
    name = "index" if source.name == "README.md" else source.stem
    return site / source.relative_to(ROOT).parent / f"{name}.html"


def test_every_page_is_built_and_the_readme_is_the_home(site: Path) -> None:
    """Every Markdown file becomes a page at its own path."""
    assert [source for source in sources() if not built(source, site).exists()] == []
    assert "shiwu tags images in the background" in (site / "index.html").read_text(encoding="utf-8")


def test_pages_load_nothing_from_another_address(site: Path) -> None:
    """Scripts, styles, fonts and images are files of the site, and browsers are told to load no others."""
    outside = re.compile(r"(?:[a-z]+:)?//", re.I)
    pages = sorted(site.rglob("*.html"))
    loads = {page: [each for each in read(page).addresses if outside.match(each)] for page in pages}
    assert {page.name: each for page, each in loads.items() if each} == {}
    assert [page.name for page in pages if "default-src 'self' file:;" not in page.read_text(encoding="utf-8")] == []
    styles = [text for page in site.rglob("*.css") for text in re.findall(r"(?:url\(|@import)[^;}]*", page.read_text())]
    assert [text[:200] for text in styles if re.search(r"(?:https?:)?//(?!www\.w3\.org)", text)] == []


def test_the_site_shows_the_blocks_that_a_forge_shows(site: Path) -> None:
    """As many lists, tables and blocks of code: nested content is indented by four columns, which both understand."""
    differences = {}
    for source in sources():
        rendered = MarkdownIt("commonmark").enable("table").render(source.read_text(encoding="utf-8"))
        forge = _Loads()
        forge.feed(f"<article>{rendered}</article>")
        shown = read(built(source, site))
        if different := {tag for tag in BLOCKS if shown.tags[tag] != forge.tags[tag]}:
            differences[str(source.relative_to(ROOT))] = sorted(different)
    assert differences == {}


def finds(browser: Browser, page: str) -> bool:
    """Whether the results of the search name a page."""
    return any(page in address for address in browser.run(FOUND))


def test_search_finds_english_and_chinese_without_a_server(site: Path, tmp_path: Path) -> None:
    """In pages opened as files; the middle of a Chinese word counts too, and nothing is loaded from the network."""
    program = chromium.find()
    if program is None or not site_scripts.are_there():
        pytest.skip("no Chromium in .venv/chromium, or no scripts in .venv/site-scripts: both need npm")
    with Browser(program, tmp_path) as browser:
        browser.open((site / "index.html").as_uri())
        for text, page in {
            "min_cosine": "docs/labels.html",
            "错误码": "docs/models.zh-CN.html",
            "用设": "README.zh-CN.html",
        }.items():
            browser.run(f"({SEARCH})({json.dumps(text)})")
            wait_until(partial(finds, browser, page), timeout_s=30, what=f"{page} to be found for {text}")
        asked = [
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
