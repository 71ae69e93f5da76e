"""Records the label sets of answers in Redis, so that clients can look up the labels of a digest."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import redis
import structlog

from shiwu.broker.known_labels import KnownLabels, KnownLabelStore

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.outcome import CommittedJob

log: FilteringBoundLogger = structlog.get_logger()
RECORD_INTERVAL_S: Final = 3600.0
"""Redis may lose a label set, so a set that is in use is recorded again after this time."""
MAX_REMEMBERED: Final = 4096
"""Digests that are remembered as recorded; beyond that the oldest are recorded again when they are used."""


class LabelSetRecorder:
    """Records each label set once an hour. Used by the commit thread.

    An error of Redis is logged and not raised, because answers do not depend on the recorded sets.
    """

    def __init__(self, store: KnownLabelStore) -> None:
        self._store = store
        self._recorded_s: OrderedDict[str, float] = OrderedDict()

    def committed(self, committed: Sequence[CommittedJob]) -> None:
        """Record the label sets that are not recorded yet, with one command."""
        now_s = time.monotonic()
        unrecorded: dict[str, LabelSet] = {}
        last: LabelSet | None = None
        for committed_job in committed:
            label_set = committed_job.job.label_set
            if label_set is None or label_set is last:
                continue
            last, digest = label_set, label_set.info.digest
            if digest not in self._recorded_s or now_s - self._recorded_s[digest] >= RECORD_INTERVAL_S:
                unrecorded[digest] = label_set
        if not unrecorded:
            return
        try:
            self._store.note([_known(digest, label_set) for digest, label_set in unrecorded.items()])
        except redis.RedisError as error:
            log.warning("label_sets_not_recorded", sets=len(unrecorded), error=str(error)[:300])
        # Also after an error, so that the next answer does not wait for a Redis that refuses label sets.
        for digest in unrecorded:
            self._recorded_s[digest] = now_s
            self._recorded_s.move_to_end(digest)
        while len(self._recorded_s) > MAX_REMEMBERED:
            self._recorded_s.popitem(last=False)


def _known(digest: str, label_set: LabelSet) -> KnownLabels:
    rules = label_set.rules
    return KnownLabels(
        digest=digest,
        labels=label_set.words,
        name=label_set.name,
        templates=label_set.templates,
        head=label_set.head,
        scale=label_set.scale,
        bias=label_set.bias,
        min_cosines=label_set.min_cosines,
        texts=None if rules is None else tuple(tuple(text for _, text in each) for each in rules.phrases),
        groups=None if rules is None else rules.groups,
        unknown=None if rules is None or rules.unknown is None else label_set.words[rules.unknown],
        calibration=label_set.info.calibration,
        aliases=None if rules is None or not any(rules.aliases) else rules.aliases,
    )
