"""shiwu's answers beside the reference script's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.picture_systems import REFERENCE, SHIWU, Place
from bench.traffic import Reply


@dataclass(frozen=True, slots=True)
class Parity:
    """What they say of the same pictures."""

    pictures: int
    same_order: int
    max_score_difference: float

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"answers against the reference script's: {self.same_order} of {self.pictures} in the same order, "
            f"scores {self.max_score_difference:.4f} apart at most"
        )


def compare(place: Place, replies: Mapping[str, Sequence[Reply]]) -> Parity | None:
    """Each picture that both have answered, once; None where the reference script did not take part."""
    if REFERENCE not in replies:
        return None
    ours, theirs = (_by_picture(replies[name], len(place.source.references)) for name in (SHIWU, REFERENCE))
    pairs = [(ours[picture], theirs[picture]) for picture in ours.keys() & theirs.keys()]
    differences = []
    for our, their in pairs:
        scores = dict(their.tags)
        differences += [abs(score - scores[label]) for label, score in our.tags if label in scores]
    same = sum([label for label, _ in a.tags] == [label for label, _ in b.tags] for a, b in pairs)
    return Parity(len(pairs), same, max(differences))


def _by_picture(replies: Sequence[Reply], different: int) -> dict[int, Reply]:
    """`traffic.build` numbers its jobs, and takes the pictures in turn."""
    return {int(one.id.rpartition("-")[2]) % different: one for one in replies}
