"""Compares shiwu's answers with those of the reference script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.picture_systems import REFERENCE, SHIWU, Place
from bench.traffic import Reply


@dataclass(frozen=True, slots=True)
class Parity:
    """Agreement on the same images."""

    pictures: int
    same_order: int
    max_score_difference: float

    @property
    def text(self) -> str:
        """The result in words."""
        return (
            f"answers against the reference script's: {self.same_order} of {self.pictures} in the same order, "
            f"scores {self.max_score_difference:.4f} apart at most"
        )


def compare(place: Place, replies: Mapping[str, Sequence[Reply]]) -> Parity | None:
    """Compare each image that both answered; return None if the reference script did not run."""
    if REFERENCE not in replies:
        return None
    own, expected = (_by_picture(replies[name], len(place.source.references)) for name in (SHIWU, REFERENCE))
    pairs = [(own[picture], expected[picture]) for picture in own.keys() & expected.keys()]
    differences = []
    for answer, reference in pairs:
        scores = dict(reference.tags)
        differences += [abs(score - scores[label]) for label, score in answer.tags if label in scores]
    same = sum([label for label, _ in a.tags] == [label for label, _ in b.tags] for a, b in pairs)
    return Parity(len(pairs), same, max(differences))


def _by_picture(replies: Sequence[Reply], different: int) -> dict[int, Reply]:
    """Return the replies by image: `traffic.build` numbers its jobs and uses the images in turn."""
    return {int(reply.id.rpartition("-")[2]) % different: reply for reply in replies}
