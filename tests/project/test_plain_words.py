"""Private words of earlier versions do not come back: each idea has one standard term.

`docs/glossary.md` has the standard terms.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDERS: Final = ("producer", "worker", "tests", "docs", "bench", "demo", "drill", "recipes", "docker", "helm")
KINDS: Final = frozenset({".py", ".md", ".lua", ".yaml", ".tpl", ".sh", ".toml"})

WORDS: Final = {
    "nursery": "fork server",
    "nurseries": "fork servers",
    "berth": "staging buffer",
    "berths": "staging buffers",
    "captain": "exclusive thread",
    "crew": "thread pool",
    "fates": "admission",
    "vitals": "health monitor",
    "doorbell": "lane notifier",
    "ledger": "answer store",
    "upkeep": "maintenance",
    "coin": "record",
    "coins": "records",
    "convict": "attribute the error to",
    "convicted": "identified",
    "convicts": "identifies",
    "guilty": "failing",
    "innocent": "unaffected",
    "innocents": "unaffected jobs",
    "accused": "suspected",
    "accuse": "suspect",
    "bury": "reap",
    "buried": "reaped",
    "born": "started",
    "orphans": "processes without a parent",
    "funeral": "exit",
    "sings": "runs",
    "sing": "run",
    "solo": "one worker",
    "rung": "batch size",
    "deaf": "ignores",
    "fate": "outcome",
    "heir": "successor",
    "parked": "delayed",
    "stranger": "producer",
    "strangers": "producers",
    "anybody": "a client, a worker, …",
    "everybody": "all clients, all workers, …",
    "nobody": "no client, no worker, …",
    "somebody": "a client, a worker, …",
    "whoever": "a client, a worker, …",
    "verdict": "outcome",
    "verdicts": "outcomes",
    "tend": "run maintenance",
    "tended": "run maintenance",
    "tends": "runs maintenance",
}
"""Word → what to write instead. Whole words in prose, and parts of identifiers."""

ALLOWED: Final = {
    # Celery's own names.
    ("solo", "worker_pool"),
    ("solo", "pool=solo"),
    ("solo", '"-P", "solo"'),
    # The name of a Redis key in earlier versions.
    ("parked", "shiwu:parked"),
    # Names that exist nowhere, in tests.
    ("nobody", '"nobody"'),
    ("nobody", "://nobody:wrong@"),
}
"""Word, and the text of a line in which it is allowed."""
PUBLIC: Final = ("--rungs", "rungs.json")
"""Options and files whose names users know."""


def tracked_files() -> list[Path]:
    """Return every text file in the project's folders and at its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(line) for line in listed.splitlines()]
    this_file = Path(__file__).relative_to(ROOT)
    return [
        path
        for path in paths
        if path != this_file
        and path.name not in {"CHANGELOG.md", "glossary.md"}
        and path.suffix in KINDS
        and (len(path.parts) == 1 or path.parts[0] in FOLDERS)
        and (ROOT / path).is_file()
    ]


def parts_of(text: str) -> set[str]:
    """Return the words of a text in lower case; identifiers such as `_SmallCrew` and `crew_size` are split."""
    names = re.findall(r"[A-Za-z]+", text)
    return {part.lower() for name in names for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def is_allowed(word: str, line: str) -> bool:
    """Return whether this line has to use this word, because it names something that users know."""
    return any(name in line for name in PUBLIC) or any((word == own and text in line) for own, text in ALLOWED)


def hits(path: Path) -> list[str]:
    """Return the private words in the name and the lines of one file, each with what to write instead."""
    found = [f"{path}: the file's name: write {WORDS[word]}" for word in parts_of(str(path)) & WORDS.keys()]
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        words = parts_of(line) & WORDS.keys()
        found += [f"{path}:{number}: {word}: write {WORDS[word]}" for word in words if not is_allowed(word, line)]
    return found


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_no_private_word_is_left(folder: str) -> None:
    """File names, identifiers, comments and documents use standard terms."""
    paths = [path for path in tracked_files() if (path.parts[0] if len(path.parts) > 1 else ".") == folder]
    assert [hit for path in paths for hit in hits(path)] == []


def test_private_words_are_found_in_names_and_prose() -> None:
    """The check sees a word inside an identifier, and not inside another word."""
    assert parts_of("self._SmallCrew = crew_size  # screw") == {"self", "small", "crew", "size", "screw"}
