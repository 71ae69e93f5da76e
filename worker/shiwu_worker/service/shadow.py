"""Shadow label set: tries another label set on a share of the images, from their vectors, and reports what it changes.

The answers stay as they are. The score thread only copies vectors into a bounded queue; a thread of its own scores and
compares them. If that thread is late, images are left out and counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from shiwu_worker.jobs.tag_differences import TagDifferences
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from structlog.typing import FilteringBoundLogger

    from shiwu.contract import Request, Tag
    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.stages.score.label_bank import LabelBank
    from shiwu_worker.stages.score.scorer import Scorer

log: FilteringBoundLogger = structlog.get_logger()
MAX_WAITING: Final = 8
"""Batches that may wait for the thread; those of 512 images take 1 MiB each."""
TICK_S: Final = 0.5
REPORT_S: Final = 60.0
"""Interval of log lines."""
MAX_NAMED: Final = 50
"""Labels that a log line names, those with most changes."""
HASH_DIGITS: Final = 8
MAX_REFERENCE_CHARS: Final = 300
"""Of an example in a log line; longer references are cut."""


@dataclass(frozen=True, slots=True)
class ShadowOptions:
    """Which label set is tried on which images."""

    name: str
    """The label set that is tried."""
    watched: str
    """The label set whose jobs are compared."""
    share: float
    """Share of the images, above 0 and up to 1. It is chosen by the hash of the file: an image is in or out."""


@dataclass(frozen=True, slots=True)
class _Portion:
    label_set: LabelSet
    """The set of the jobs."""
    requests: Sequence[Request]
    tags: Sequence[Sequence[Tag]]
    images: Sequence[str]
    vectors: NDArray[np.float32]


class ShadowScorer:
    """Owns a thread. The score thread calls `encoded`, which neither raises nor blocks.

    Args:
        on_compared: gets numbers of images (same, changed, first, dropped) and of tags (same, added, removed).
        report_s: interval of log lines.
    """

    def __init__(
        self,
        options: ShadowOptions,
        *,
        bank: LabelBank,
        scorer: Scorer,
        on_compared: Callable[[Mapping[str, int], Mapping[str, int]], None],
        report_s: float = REPORT_S,
    ) -> None:
        self.name = options.name
        self._options = options
        self._bank = bank
        self._scorer = scorer
        self._on_compared = on_compared
        self._report_s = report_s
        self._below = int(options.share * 16**HASH_DIGITS)
        self._waiting: queue.Queue[_Portion] = queue.Queue(MAX_WAITING)
        self._is_failed = False
        self._closed = threading.Event()
        self._found = TagDifferences()
        self._of: tuple[str, str] = ("", "")
        """Digests of the two label sets that `_found` is about."""
        self._left_out = 0
        """Images that were not compared since the last report."""
        self._lock = threading.Lock()
        self.thread = ServiceThread("shadow", self._run, on_fatal=None, stop=self._closed.set)

    # -------------------------------------------------------------------------------- score thread
    def encoded(self, jobs: Sequence[Job], vectors: NDArray[np.float32]) -> None:
        """Take a share of the images of these jobs, which have their tags; row i of `vectors` belongs to `jobs[i]`."""
        if self._is_failed:
            return
        try:
            portion = self._portion(jobs, vectors)
            if portion is not None:
                self._put(portion)
        except Exception:  # border: a shadow must not cost a job its answer
            self._is_failed = True
            log.exception("shadow_failed", label_set=self._options.watched, shadow=self._options.name)

    def _portion(self, jobs: Sequence[Job], vectors: NDArray[np.float32]) -> _Portion | None:
        watched = self._bank.sets.get(self._options.watched)
        if watched is None:
            return None
        rows = [row for row, job in enumerate(jobs) if self._is_chosen(job, watched)]
        if not rows:
            return None
        chosen = [jobs[row] for row in rows]
        return _Portion(
            watched,
            [job.request for job in chosen if job.request is not None],
            [job.tags or () for job in chosen],
            [job.image.reference if job.image is not None else job.log_id for job in chosen],
            vectors[rows],
        )

    def _is_chosen(self, job: Job, watched: LabelSet) -> bool:
        mine = job.label_set
        if mine is None or mine.name != watched.name or job.tags is None or job.request is None or not job.sha256:
            return False
        is_in_share = int(job.sha256[:HASH_DIGITS], 16) < self._below
        # Jobs that were admitted before a reload, or with another head, have other rules.
        return is_in_share and mine.head == watched.head and mine.info.digest == watched.info.digest

    def _put(self, portion: _Portion) -> None:
        try:
            self._waiting.put_nowait(portion)
        except queue.Full:
            self._drop(len(portion.images))

    # -------------------------------------------------------------------------------- thread of its own
    def _run(self) -> None:
        report_due_s = time.monotonic() + self._report_s
        while not (self._closed.is_set() and self._waiting.empty()):
            try:
                self._compare(self._waiting.get(timeout=TICK_S))
            except queue.Empty:
                pass
            except Exception:  # border: without its thread the shadow would stop without a word
                self._is_failed = True
                log.exception("shadow_failed", label_set=self._options.watched, shadow=self._options.name)
                return
            if time.monotonic() >= report_due_s:
                report_due_s = time.monotonic() + self._report_s
                self._report()
        self._report()

    def _compare(self, portion: _Portion) -> None:
        shadow_set = self._bank.sets.get(self._options.name)
        labels = None if shadow_set is None else self._bank.known(shadow_set)
        if shadow_set is None or labels is None:
            self._drop(len(portion.images))
            return
        digests = portion.label_set.info.digest, shadow_set.info.digest
        if digests != self._of:
            self._report()
            self._of = digests
        found = TagDifferences()
        tags = self._scorer.image_tags(portion.vectors, labels, portion.requests)
        for image, before, after in zip(portion.images, portion.tags, tags, strict=True):
            found.add(image, before, after)
            self._found.add(image, before, after)
        images = {"same": found.same, "first": found.top1, "changed": found.images - found.same - found.top1}
        self._on_compared(images, found.totals())

    def _drop(self, images: int) -> None:
        """Count images that are not compared: the thread is late, or the labels have no vectors yet."""
        with self._lock:
            self._left_out += images
        self._on_compared(Counter(dropped=images), {})

    def _report(self) -> None:
        """Log what was compared since the last line, and begin anew."""
        found, self._found = self._found, TagDifferences()
        with self._lock:
            left_out, self._left_out = self._left_out, 0
        if not found.images and not left_out:
            return
        labels = found.labels()
        fields: dict[str, Any] = {
            "images": found.images,
            "same": found.same,
            "top1_changed": found.top1,
            "dropped": left_out,
            **{f"tags_{change}": count for change, count in found.totals().items()},
            "changes": [
                [label, found.kept[label], found.added[label], found.removed[label], _example(found, label)]
                for label in labels[:MAX_NAMED]
            ],
            "changes_left_out": max(0, len(labels) - MAX_NAMED),
        }
        digest, shadow_digest = self._of
        log.info(
            "shadow_compared",
            label_set=self._options.watched,
            digest=digest,
            shadow=self._options.name,
            shadow_digest=shadow_digest,
            **fields,
        )


def _example(found: TagDifferences, label: str) -> str:
    return found.examples[label][0][:MAX_REFERENCE_CHARS]
