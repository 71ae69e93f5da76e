"""docs/architecture.md against the code: keys, diagrams and decisions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
DECISIONS = ROOT / "docs" / "decisions"
SECTIONS = ["Status: ", "## Context\n", "## Decision\n", "## Consequences\n"]
_NODE = re.compile(r"\b([a-z]+) ?(?:\[\(|\[)")
_ARROW = re.compile(r"^\s*([a-z]+) (?:-->|--|-\.) ?(?:\".*?\" ?(?:-->|\.->) )?([a-z]+)\s*$")


def mermaid(kind: str) -> str:
    """The one diagram of this kind on the page."""
    text = PAGE.read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```mermaid\n(.*?)```", text, re.S) if block.startswith(kind)]
    return str(found)


def key_names() -> set[str]:
    """Every key, prefix and channel that contract/keys.py writes as a text."""
    tree = ast.parse((ROOT / "producer" / "shiwu" / "contract" / "keys.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {text for text in texts if re.fullmatch(r"shiwu:[a-z:-]+|celery-task-meta-", text)}


def test_every_redis_key_is_in_the_table() -> None:
    """Also the prefixes; those end with a placeholder in the table."""
    rows = re.findall(r"^\| `((?:shiwu:|celery-task-meta-)[^`]*)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    listed = {re.sub(r"<\w+>$", "", row) for row in rows}
    assert len(key_names()) > 20
    assert listed == key_names()


def test_processes_in_the_diagram_are_defined() -> None:
    """An arrow between nodes that have no label would draw boxes with bare ids."""
    diagram = mermaid("flowchart")
    defined = set(_NODE.findall(diagram)) | set(re.findall(r"subgraph (\w+) \[", diagram))
    arrows = [found.groups() for line in diagram.splitlines() if (found := _ARROW.match(line))]
    assert len(arrows) > 10
    assert {node for arrow in arrows for node in arrow} <= defined
    assert diagram.count("subgraph ") == len(re.findall(r"^\s*end$", diagram, re.M))


def test_states_in_the_diagram_are_those_of_the_table() -> None:
    """One row for each state of a job."""
    states = set(re.findall(r"\b([a-z]+)(?= -->|:)", mermaid("stateDiagram")))
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("| state | keys |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| ([a-z]+) \|", table, re.M)) == states


def test_every_decision_is_in_the_index() -> None:
    """Numbers are consecutive, and each page is linked once with its title."""
    pages = sorted(page for page in DECISIONS.glob("*.md") if page.name != "README.md")
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    linked = dict(re.findall(r"^- \[\d{4}\]\((\S+)\) (.+)$", index, re.M))
    titles = {page.name: page.read_text(encoding="utf-8").split("\n")[0].split(". ", 1)[1] for page in pages}
    assert linked == titles


@pytest.mark.parametrize("page", sorted(DECISIONS.glob("[0-9]*.md")), ids=lambda page: page.name)
def test_a_decision_has_all_sections(page: Path) -> None:
    """Status, context, decision and consequences, in this order."""
    text = page.read_text(encoding="utf-8")
    places = [text.find(section) for section in SECTIONS]
    assert -1 not in places
    assert places == sorted(places)
