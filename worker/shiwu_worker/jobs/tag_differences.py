"""What another label set changes: counts of images, and of tags by label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shiwu.contract import Tag

MAX_EXAMPLES: Final = 5
"""Images that are kept for each label."""


@dataclass(slots=True)
class TagDifferences:
    """The memory depends on the number of labels only. Not thread-safe."""

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
    unnamed: Counter[str] = field(default_factory=Counter)
    """Tags whose labels are not known: same, added, removed."""

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
            self.add_example(label, image)

    def add_example(self, label: str, image: str) -> None:
        """Keep an image that gets or loses this label, if there are not enough."""
        found = self.examples.setdefault(label, [])
        if len(found) < MAX_EXAMPLES:
            found.append(image)

    def totals(self) -> dict[str, int]:
        """Tags of all labels: same, added, removed."""
        named = {"same": self.kept, "added": self.added, "removed": self.removed}
        return {change: counts.total() + self.unnamed[change] for change, counts in named.items()}

    def labels(self) -> list[str]:
        """Labels that are added or removed, those with most changes first."""
        changes = self.added + self.removed
        return [label for label, _ in sorted(changes.items(), key=lambda each: (-each[1], each[0]))]
