"""docs/architecture.md against the code: keys, diagrams and decisions."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
DECISIONS = ROOT / "docs" / "decisions"
SECTIONS = ["Status: ", "## Context\n", "## Decision\n", "## Consequences\n"]
_NODE = re.compile(r"\b([a-z]+) ?(?:\[\(|\[)")
_ARROW = re.compile(r"^\s*([a-z]+) (?:-->|--|-\.) ?(?:\".*?\" ?(?:-->|\.->) )?([a-z]+)\s*$")


def listed() -> set[str]:
    """The paths in the tree of the page."""
    text = PAGE.read_text(encoding="utf-8")
    found: set[str] = set()
    parents: list[str] = []
    for line in text.split("```text\n")[1].split("```")[0].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]  # no line is empty
        parents = [*parents[: len(indent) // 2], name.rstrip("/")]
        found.add("/".join(parents))
    return found


def modules(folder: Path) -> set[str]:
    """The packages and modules of a folder, as the tree lists them."""
    return {
        str(path.relative_to(ROOT))
        for path in folder.iterdir()
        if (path.is_dir() and path.name != "__pycache__") or (path.suffix == ".py" and path.name != "__init__.py")
    }


def test_the_tree_is_the_real_one() -> None:
    """Packages and modules at the roots of both sides, and the seven stages."""
    roots = [ROOT / "producer" / "shiwu", ROOT / "worker" / "shiwu_worker", ROOT / "worker" / "shiwu_worker" / "stages"]
    real = {str(root.relative_to(ROOT)) for root in roots}.union(*map(modules, roots))
    assert listed() == real


def front_doors() -> dict[str, set[str]]:
    """The table of front doors: package, modules."""
    table = PAGE.read_text(encoding="utf-8").split("| package | front door |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", table, re.M)
    return {package: set(re.findall(r"`(.+?)`", modules)) for package, modules in rows}


def folder_of(package: str) -> Path:
    """The folder of a package of the table; those of the worker stand there without its name."""
    side = ROOT / "producer" if package.startswith("shiwu.") else ROOT / "worker" / "shiwu_worker"
    return side / package.replace(".", "/")


def test_front_doors_exist() -> None:
    """Each module of the table is a module of its package."""
    doors = [(package, door) for package, modules in front_doors().items() for door in modules]
    assert len(doors) > 20
    files = {(package, door): folder_of(package) / f"{door.replace('.', '/')}.py" for package, door in doors}
    assert [door for door, file in files.items() if not file.is_file()] == []


def test_front_doors_are_those_of_the_import_contracts() -> None:
    """import-linter holds each row of the table, and no other package has a contract."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contracts = [contract for contract in config["contracts"] if contract["type"] == "front_door"]
    assert front_doors() == {
        contract["package"].removeprefix("shiwu_worker."): set(contract["doors"]) for contract in contracts
    }


def test_floors_are_those_of_the_import_contracts() -> None:
    """Each row of the table of floors is a layer of the contract, from top to bottom, for both packages."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = {
        contract["containers"][0]: [set(layer.split(" | ")) for layer in contract["layers"]]
        for contract in config["contracts"]
        if contract["type"] == "layers"
    }
    table = PAGE.read_text(encoding="utf-8").split("| floor | packages |")[1].split("\n\n")[0]
    *rows, below = [line.split("|")[2] for line in table.splitlines()[2:]]
    own, _, shared = below.partition("the shared package:")
    named = [set(re.findall(r"`(\w+)`", row)) for row in (*rows, own)]
    assert named == layers["shiwu_worker"]
    assert [set(re.findall(r"`(\w+)`", row)) for row in shared.split(">")] == layers["shiwu"]


def test_docstring_of_a_package_names_its_front_door() -> None:
    """Each module of the table stands in the docstring of its package."""
    for package, doors in front_doors().items():
        source = (folder_of(package) / "__init__.py").read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(source)) or ""
        assert doors - set(re.findall(r"`([\w.]+)`", docstring)) == set(), package


def mermaid(kind: str) -> str:
    """The one diagram of this kind on the page."""
    text = PAGE.read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```mermaid\n(.*?)```", text, re.S) if block.startswith(kind)]
    return str(found)


def test_owners_of_threads_exist() -> None:
    """Each class in the table of threads is a class of the worker."""
    table = PAGE.read_text(encoding="utf-8").split("| thread | owner |")[1].split("\n\n")[0]
    owners = set(re.findall(r"`([A-Z]\w+)`", "\n".join(line.split("|")[2] for line in table.splitlines()[2:])))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "worker").rglob("*.py"))
    assert len(owners) > 8
    assert [owner for owner in sorted(owners) if not re.search(rf"^class {owner}\b", sources, re.M)] == []


def test_threads_of_the_table_are_those_of_the_code() -> None:
    """Each name in the table is created in the worker, and each name that a ServiceThread has is in the table."""
    table = PAGE.read_text(encoding="utf-8").split("| thread | owner |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([\w-]+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    listed = {name.removesuffix("-N") for row in rows for name in row}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "worker").rglob("*.py"))
    created = set(re.findall(r'ServiceThread\(\s*f?"([a-z-]+?)-?["{]', sources))
    assert all(rows)
    assert created
    assert created - listed == set()
    missing = [name for name in listed - {"MainThread"} if not re.search(rf'f?"{name}["-]', sources)]
    assert missing == []


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
