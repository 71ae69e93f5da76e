"""What another label set changes: for each label the images that got it or lost it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from shiwu.contract import Answer, Tag, printable

EXAMPLES: Final = 10
"""Images that are kept for each label and each direction of change: those with the highest scores."""
MAX_LABELS_WITH_EXAMPLES: Final = 5000
"""Further labels are counted and get no examples, which bounds the memory to some 70 MB."""


@dataclass(frozen=True, slots=True)
class Example:
    """An image whose tags changed."""

    score: float
    """Of the label, in the set that gave it."""
    reference: str
    line: bytes
    """The new answer, as JSON."""


@dataclass(slots=True)
class LabelChange:
    """How many images got a label from either set, and examples of those that differ."""

    label: str
    has_examples: bool
    before: int = 0
    after: int = 0
    gained: int = 0
    lost: int = 0
    gained_by: list[Example] = field(default_factory=list)
    lost_by: list[Example] = field(default_factory=list)


class Changes:
    """Counts the differences between the tags of two label sets. The memory depends on the number of labels only."""

    def __init__(self) -> None:
        self._labels: dict[str, LabelChange] = {}

    def add(self, reference: str, line: bytes, *, before: Sequence[Tag], after: Sequence[Tag]) -> None:
        """Count one image. `line` is its new answer, as JSON."""
        had, has = ({tag.label: tag.score for tag in tags} for tags in (before, after))
        for label, score in had.items():
            change = self._of(label)
            change.before += 1
            if label not in has:
                change.lost += 1
                _keep(change, change.lost_by, Example(score, reference, line))
        for label, score in has.items():
            change = self._of(label)
            change.after += 1
            if label not in had:
                change.gained += 1
                _keep(change, change.gained_by, Example(score, reference, line))

    def _of(self, label: str) -> LabelChange:
        if (change := self._labels.get(label)) is None:
            has_examples = len(self._labels) < MAX_LABELS_WITH_EXAMPLES
            change = self._labels[label] = LabelChange(label, has_examples)
        return change

    def sorted(self) -> list[LabelChange]:
        """The labels that changed, those with most changes first."""
        changed = [each for each in self._labels.values() if each.gained or each.lost]
        return sorted(changed, key=lambda each: (-each.gained - each.lost, each.label))

    def report(self) -> Iterator[str]:
        """A line for each label that changed, and one for each example."""
        for change in self.sorted():
            counts = f"{change.before} -> {change.after}, gained {change.gained}, lost {change.lost}"
            yield f"{printable(change.label)}: {counts}"
            for sign, examples in (("+", change.gained_by), ("-", change.lost_by)):
                yield from (f"  {sign} {each.score:.3f} {printable(each.reference)}" for each in _best_first(examples))

    def example_lines(self) -> Iterator[bytes]:
        """The new answers of all examples as JSON lines, each once, with the changes of its tags as metadata."""
        changes: dict[bytes, dict[str, list[str]]] = {}
        for change in self.sorted():
            for kind, examples in (("gained", change.gained_by), ("lost", change.lost_by)):
                for each in _best_first(examples):
                    changes.setdefault(each.line, {}).setdefault(kind, []).append(change.label)
        for line, metadata in changes.items():
            answer = Answer.from_json(line)
            yield msgspec.structs.replace(answer, metadata=metadata).to_json() + b"\n"


def _keep(change: LabelChange, kept: list[Example], example: Example) -> None:
    if not change.has_examples:
        return
    if len(kept) < EXAMPLES:
        kept.append(example)
        return
    lowest = min(range(EXAMPLES), key=lambda place: kept[place].score)
    if example.score > kept[lowest].score:
        kept[lowest] = example


def _best_first(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda each: -each.score)
