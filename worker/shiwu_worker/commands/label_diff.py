"""`shiwu-worker labels diff`: what another label set changes on images whose vectors are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click
from rich.console import Console
from rich.table import Table

from shiwu_worker.commands.answer_vectors import read_vectors
from shiwu_worker.commands.loaded_labels import Loaded, load, run_command
from shiwu_worker.commands.rule_tables import label_cosines, tags_of
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.stages.score.label_files import load_label_set

if TYPE_CHECKING:
    from shiwu.contract import Tag
    from shiwu_worker.jobs.label_set import LabelSet

SHOWN_LABELS: Final = 30
SHOWN_IMAGES: Final = 5
"""References of one label in JSON."""


@dataclass(slots=True)
class Differences:
    """Counts of images, and of tags by label."""

    images: int = 0
    same: int = 0
    """Images with the same labels in the same order."""
    top1: int = 0
    """Images whose first label is another one."""
    added: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Label → images that get or lose it."""

    def add(self, image: str, before: Sequence[Tag], after: Sequence[Tag]) -> None:
        """Count one image."""
        old, new = [tag.label for tag in before], [tag.label for tag in after]
        self.images += 1
        self.same += old == new
        self.top1 += old[:1] != new[:1]
        self.added.update(set(new) - set(old))
        self.removed.update(set(old) - set(new))
        self.kept.update(set(old) & set(new))
        for label in sorted(set(old) ^ set(new)):
            found = self.examples.setdefault(label, [])
            if len(found) < SHOWN_IMAGES:
                found.append(image)

    def labels(self) -> list[str]:
        """Labels that are added or removed, those with most changes first."""
        changes = self.added + self.removed
        return [label for label, _ in sorted(changes.items(), key=lambda each: (-each[1], each[0]))]


def run_diff(old: str, new: str, answers: BinaryIO, *, top_k: int, as_json: bool) -> int:
    """Compare two label sets, print what differs, and return the exit code."""
    return run_command(lambda: _diff(old, new, answers, top_k=top_k, as_json=as_json))


def _diff(old: str, new: str, answers: BinaryIO, *, top_k: int, as_json: bool) -> int:
    loaded = load([name for name in (old, new) if not _is_file(name)])
    read = read_vectors(answers, model=loaded.model)
    before, after = (_tags(loaded, _label_set(loaded, name), read.vectors, top_k=top_k) for name in (old, new))
    found = Differences()
    for answer, one, other in zip(read.answers, before, after, strict=True):
        found.add(answer.image.reference if answer.image is not None else answer.id, one, other)
    if as_json:
        click.echo(json.dumps(_as_json(found), ensure_ascii=False, indent=2))
    else:
        _print(found)
    return 0


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in {".yaml", ".yml"}


def _label_set(loaded: Loaded, name: str) -> LabelSet:
    """The set of a file, or the one of this name.

    Raises:
        FatalError: with ExitCode.CONFIG, when the file is wrong.
    """
    if not _is_file(name):
        return loaded.sets[name]
    try:
        return load_label_set(Path(name))
    except ValueError as error:
        raise FatalError(ExitCode.CONFIG, str(error)) from error


def _tags(loaded: Loaded, label_set: LabelSet, vectors: Any, *, top_k: int) -> list[tuple[Tag, ...]]:
    encoded = loaded.encode(label_set)
    return tags_of(label_cosines(vectors, encoded), encoded, scale=loaded.scale, bias=loaded.bias, top_k=top_k)


def _as_json(found: Differences) -> dict[str, Any]:
    return {
        "images": found.images,
        "same": found.same,
        "top1_changed": found.top1,
        "tags_same": found.kept.total(),
        "tags_added": found.added.total(),
        "tags_removed": found.removed.total(),
        "labels": [
            {
                "label": label,
                "same": found.kept[label],
                "added": found.added[label],
                "removed": found.removed[label],
                "images": found.examples[label],
            }
            for label in found.labels()
        ],
    }


def _print(found: Differences) -> None:
    table = Table("label", "same", "added", "removed", "for example", box=None)
    labels = found.labels()
    for label in labels[:SHOWN_LABELS]:
        counts = (str(each[label]) for each in (found.kept, found.added, found.removed))
        table.add_row(label, *counts, found.examples[label][0])
    if labels:
        Console(markup=False, emoji=False, highlight=False).print(table)
    if len(labels) > SHOWN_LABELS:
        click.echo(f"{len(labels) - SHOWN_LABELS} labels more; --json has all")
    click.echo(f"{found.images} images: {found.same} with the same tags, {found.top1} with another first tag")
    totals = found.kept.total(), found.added.total(), found.removed.total()
    click.echo("tags: {} same, {} added, {} removed".format(*totals))
