"""What changes between two label sets, label by label."""

from __future__ import annotations

import json

from shiwu.contract import Answer, ImageInfo, Status, Tag
from shiwu_worker.retag.changes import EXAMPLES, Changes


def tags(**scores: float) -> tuple[Tag, ...]:
    """Tags of these labels."""
    return tuple(Tag(label, score, 0.1) for label, score in scores.items())


def answer(reference: str) -> bytes:
    """An answer, as a line of JSON."""
    return Answer(reference, Status.TAGGED, image=ImageInfo(reference=reference), tags=()).to_json() + b"\n"


def test_gains_and_losses_are_counted_by_label() -> None:
    """A label that an image has in both sets is no change, whatever its score."""
    changes = Changes()
    changes.add("a", answer("a"), before=tags(cat=0.9, dog=0.1), after=tags(cat=0.5, 猫=0.5))
    changes.add("b", answer("b"), before=tags(dog=0.2), after=tags(dog=0.3))
    changes.add("c", answer("c"), before=(), after=tags(猫=0.7))
    counts = {each.label: (each.before, each.after, each.gained, each.lost) for each in changes.sorted()}
    assert counts == {"猫": (0, 2, 2, 0), "dog": (2, 1, 0, 1)}
    assert list(changes.report()) == [
        "猫: 0 -> 2, gained 2, lost 0",
        "  + 0.700 c",
        "  + 0.500 a",
        "dog: 2 -> 1, gained 0, lost 1",
        "  - 0.100 a",
    ]


def test_examples_are_those_with_the_highest_scores() -> None:
    """At most so many for each label and direction."""
    changes = Changes()
    for number in range(3 * EXAMPLES):
        score = (number * 7 % 30) / 30
        changes.add(str(number), answer(str(number)), before=(), after=tags(cat=score))
    [change] = changes.sorted()
    kept = sorted((each.score for each in change.gained_by), reverse=True)
    assert kept == [n / 30 for n in range(29, 29 - EXAMPLES, -1)]


def test_example_lines_are_answers_with_their_changes() -> None:
    """Each image once, with all labels that it gained or lost."""
    changes = Changes()
    changes.add("a", answer("a"), before=tags(dog=0.2), after=tags(cat=0.5, cow=0.4))
    changes.add("b", answer("b"), before=tags(dog=0.2), after=tags(dog=0.2))
    [line] = changes.example_lines()
    found = json.loads(line)
    assert (found["id"], found["metadata"]) == ("a", {"gained": ["cat", "cow"], "lost": ["dog"]})
    assert line.endswith(b"}\n")
