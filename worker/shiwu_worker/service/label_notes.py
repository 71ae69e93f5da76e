"""Notes the label set of each answer once, so that a digest can be turned into its labels."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import redis
import structlog

from shiwu.broker.known_labels import KnownLabels, KnownLabelStore

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.outcome import CommittedJob

log: Any = structlog.get_logger()
NOTED_AGAIN_S: Final = 3600.0
"""Redis may have lost a note, so each set that is in use is noted now and then."""
MAX_REMEMBERED: Final = 4096


class LabelNoter:
    """Told of each answer; the thread that commits calls it. Never raises: notes are help for people."""

    def __init__(self, notes: KnownLabelStore) -> None:
        self._notes = notes
        self._noted_s: OrderedDict[str, float] = OrderedDict()

    def committed(self, committed: Sequence[CommittedJob]) -> None:
        """Note the label sets that are new, with one call."""
        now_s = time.monotonic()
        fresh: dict[str, LabelSet] = {}
        last: LabelSet | None = None
        for each in committed:
            label_set = each.job.label_set
            if label_set is None or label_set is last:
                continue
            last, digest = label_set, label_set.info.digest
            if digest not in self._noted_s or now_s - self._noted_s[digest] >= NOTED_AGAIN_S:
                fresh[digest] = label_set
        if not fresh:
            return
        try:
            self._notes.note([_known(digest, label_set) for digest, label_set in fresh.items()])
        except redis.RedisError as error:
            log.warning("label_sets_not_recorded", sets=len(fresh), error=str(error)[:300])
        # Also after an error: the next answer must not wait for a Redis that refuses notes.
        for digest in fresh:
            self._noted_s[digest] = now_s
            self._noted_s.move_to_end(digest)
        while len(self._noted_s) > MAX_REMEMBERED:
            self._noted_s.popitem(last=False)


def _known(digest: str, label_set: LabelSet) -> KnownLabels:
    return KnownLabels(
        digest=digest,
        labels=label_set.words,
        name=label_set.name,
        templates=label_set.templates,
        head=label_set.head,
        scale=label_set.scale,
        bias=label_set.bias,
        min_cosines=label_set.min_cosines,
    )
