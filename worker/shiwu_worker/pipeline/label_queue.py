"""Jobs whose label sets have no vectors yet, and the labels that are to be encoded for them.

The encode thread encodes labels in portions between batches of images, so that no batch waits longer than for one
portion. While images wait, the labels of each lane get a share of the thread's time; an idle device encodes without
pauses. Interactive labels go first. Label sets of the operator are encoded while the device is idle, before a job needs
them.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from shiwu.contract import ErrorCode, ErrorInfo, Lane, Stage
from shiwu_worker.errors import DeviceErrorKind, ExitCode, FatalError
from shiwu_worker.pipeline.admission import Admit, Decision, Defer, Reject

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.jobs.label_rules import Phrase
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels, EncodedWord
    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.policy.limits import LabelLimits
    from shiwu_worker.stages.score.label_bank import LabelBank

log: FilteringBoundLogger = structlog.get_logger()
MAX_TEXTS: Final = 128
"""Most texts of one portion: larger calls of the model take more memory and are hardly cheaper per text."""
SHORTEST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 30.0
"""Bounds of the pause of a job for whose labels the queue has no room."""
Group: TypeAlias = Lane | None
"""The lane whose jobs wait for a label set; None for a configured set that no job waits for."""
OnEnd: TypeAlias = Callable[["EncodedLabels | ErrorInfo"], None]
GROUPS: Final[tuple[Group, ...]] = (Lane.INTERACTIVE, Lane.BULK, None)


@dataclass(eq=False)
class _Entry:
    """Labels that are being encoded, and the jobs that wait for all of them."""

    label_set: LabelSet
    missing: deque[tuple[Phrase, int]]
    """Texts of labels without vectors, each with its units of cost, short ones first."""
    words: dict[Phrase, EncodedWord]
    units: int
    """The units of all missing labels."""
    group: Group
    jobs: list[Job] = field(default_factory=list)
    on_end: list[OnEnd] = field(default_factory=list)
    """Called with the result, also if no job waits for it."""


class LabelQueue:
    """Thread-safe. The claim thread admits jobs, the loaders' thread reports images, and the encode thread encodes.

    Args:
        error_kind: what an error of the model means.
        image_s: seconds that the smallest batch of images takes now.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        label_bank: LabelBank,
        limits: LabelLimits,
        *,
        error_kind: Callable[[BaseException], DeviceErrorKind],
        image_s: Callable[[], float],
        observer: PipelineObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bank = label_bank
        self._limits = limits
        self._error_kind = error_kind
        self._image_s = image_s
        self._observer = observer
        self._clock = clock
        self._shares = {Lane.INTERACTIVE: limits.interactive_share, Lane.BULK: limits.bulk_share, None: 0.0}
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry] = {}
        """By templates and labels, the oldest first."""
        self._waiting: dict[Job, tuple[_Entry, LabelSet]] = {}
        self._held: dict[Lane, int] = dict.fromkeys(Lane, 0)
        """How many jobs of each lane wait."""
        self._loaded: set[Job] = set()
        """Those of the waiting jobs whose images are loaded."""
        self._not_before_s: dict[Group, float] = dict.fromkeys(GROUPS, 0.0)
        """While images wait, no portion of the group begins earlier."""
        self._is_turn_of_oldest = True
        for label_set in label_bank.configured:
            if label_bank.known(label_set) is None:
                self._entries[label_set.text_key] = self._make_entry(label_set, None)

    def __len__(self) -> int:
        """How many jobs wait for labels."""
        return len(self._waiting)

    def waiting_jobs(self) -> dict[Lane, int]:
        """How many jobs of each lane wait for labels."""
        with self._lock:
            return dict(self._held)

    def words_waiting(self) -> dict[Group, int]:
        """How many labels are to be encoded for each lane."""
        with self._lock:
            return {
                group: sum(len(entry.missing) for entry in self._entries.values() if entry.group is group)
                for group in GROUPS
            }

    # -------------------------------------------------------------------------------- claim thread
    def admit(self, job: Job, label_set: LabelSet) -> Decision:
        """Whether a job with this label set is loaded. If some labels have no vectors, it waits here from now on."""
        if (labels := self._bank.known(label_set)) is not None:
            return Admit(labels.label_set, labels)
        with self._lock:
            # Asked again: the encode thread may have completed the set before the lock was taken.
            if (labels := self._bank.known(label_set)) is not None:
                return Admit(labels.label_set, labels)
            if (delay_s := self._delay_s(job.lane)) is not None:
                return Defer(delay_s)
            entry = self._entries.get(label_set.text_key)
            if entry is None:
                entry = self._make_entry(label_set, job.lane)
                if label_set.name is None and (error := self._cost_error(entry)) is not None:
                    return Reject(error)
                self._entries[label_set.text_key] = entry
            if entry.group is None or job.lane is Lane.INTERACTIVE:
                entry.group = job.lane
            entry.jobs.append(job)
            # Equal sets become one object, so that jobs with the same labels share it.
            shared = entry.label_set if entry.label_set == label_set else label_set
            self._waiting[job] = entry, shared
            self._held[job.lane] += 1
            return Admit(shared)

    def encode_ahead(self, label_set: LabelSet, on_end: OnEnd) -> None:
        """Encode a label set that no job waits for yet, at the share of bulk jobs. Any thread may call it.

        Args:
            on_end: gets the labels, with the set or an equal one, or why the model failed; must not raise or block.
        """
        with self._lock:
            if (labels := self._bank.known(label_set)) is None:
                entry = self._entries.get(label_set.text_key)
                if entry is None:
                    entry = self._entries[label_set.text_key] = self._make_entry(label_set, Lane.BULK)
                entry.group = entry.group or Lane.BULK
                entry.on_end.append(on_end)
                return
        on_end(labels)

    def _make_entry(self, label_set: LabelSet, group: Group) -> _Entry:
        words = self._bank.cached_words(label_set)
        missing = {phrase: self._bank.units(phrase) for phrase in label_set.phrases if phrase not in words}
        # Short labels together, because the shorter texts of a call are padded to the longest.
        ordered = deque(sorted(missing.items(), key=lambda each: each[1]))
        return _Entry(label_set, ordered, words, sum(missing.values()), group)

    def _cost_error(self, entry: _Entry) -> ErrorInfo | None:
        cost_s, limit_s = self._bank.cost.seconds(entry.units), self._limits.max_request_s
        if cost_s <= limit_s:
            return None
        text = (
            f"labels: expected new labels that the model encodes within {limit_s:g} s, got {len(entry.missing)} labels "
            f"that take about {cost_s:.0f} s; send fewer or shorter labels, or name a label set of the worker"
        )
        return ErrorInfo(code=ErrorCode.LABELS_TOO_COSTLY, message=text, stage=Stage.CLAIM)

    def _delay_s(self, lane: Lane) -> float | None:
        """After which time a job comes back because the queue of its lane is full; None if there is room."""
        lane_s = self._bank.cost.seconds(sum(entry.units for entry in self._entries.values() if entry.group is lane))
        if self._held[lane] < self._limits.jobs_per_lane or lane_s <= self._limits.quick_s:
            return None
        # With jitter, so that jobs that were refused together do not return together.
        delay_s = lane_s / self._shares[lane] * random.uniform(0.75, 1.25)  # noqa: S311 no secret
        return max(SHORTEST_DELAY_S, min(LONGEST_DELAY_S, delay_s))

    # -------------------------------------------------------------------------------- the loaders' thread
    def loaded(self, jobs: Sequence[Job]) -> list[Job]:
        """Note that the images of these jobs are loaded; return those that do not wait for labels."""
        if not self._waiting:
            return list(jobs)
        with self._lock:
            waiting = [job for job in jobs if job in self._waiting]
            self._loaded.update(waiting)
            return [job for job in jobs if job not in self._waiting]

    def discard(self, jobs: Sequence[Job]) -> None:
        """Forget jobs whose attempts ended in another way. Labels that no job waits for are not encoded."""
        if self._waiting:
            with self._lock:
                for job in jobs:
                    self._forget(job)

    def _forget(self, job: Job) -> None:
        self._loaded.discard(job)
        if job not in self._waiting:
            return
        entry, _ = self._waiting.pop(job)
        self._held[job.lane] -= 1
        entry.jobs.remove(job)
        if not entry.jobs and entry.on_end:
            entry.group = Lane.BULK
        elif not entry.jobs and entry.label_set.name is not None:
            entry.group = None
        elif not entry.jobs:
            del self._entries[entry.label_set.text_key]
        elif entry.group is Lane.INTERACTIVE and all(each.lane is Lane.BULK for each in entry.jobs):
            entry.group = Lane.BULK

    # -------------------------------------------------------------------------------- encode thread
    def drop_unwanted(self, now_s: float) -> list[Job]:
        """Let jobs go whose deadline has passed, or which were answered elsewhere; return those that are loaded."""
        if not self._waiting:
            return []
        with self._lock:
            gone = [job for job in self._waiting if job.is_answered_elsewhere or job.expiry(now_s) is not None]
            loaded = [job for job in gone if job in self._loaded]
            for job in gone:
                self._forget(job)
        return loaded

    def wait_s(self, *, is_idle: bool) -> float | None:
        """In how many seconds a portion may be encoded; None where no labels wait.

        Args:
            is_idle: no images wait, and none are on the device.
        """
        if not self._entries:
            return None
        with self._lock:
            groups = {entry.group for entry in self._entries.values()}
            if is_idle and groups:
                return 0.0
            now_s = self._clock()
            return min(
                (max(0.0, self._not_before_s[group] - now_s) for group in groups if group is not None), default=None
            )

    def run_portion(self, *, is_idle: bool) -> list[Job]:
        """Encode one portion of labels, if one may be encoded now. Return loaded jobs with their labels or an error.

        Raises:
            FatalError: with ExitCode.DEVICE, when no later call of the model can succeed in this process.
        """
        began_s = self._clock()
        with self._lock:
            entry = self._choose(began_s, is_idle=is_idle)
            if entry is None:
                return []
            portion = self._take_portion(entry)
            jobs = list(entry.jobs)
        for job in jobs:
            job.is_on_device = True
        result: EncodedLabels | ErrorInfo | None = None
        try:
            if portion:
                entry.words |= self._bank.encode_words(entry.label_set, portion)
            if not entry.missing:
                result = self._bank.complete(entry.label_set, entry.words)
        except Exception as error:  # noqa: BLE001 border: the model may raise anything
            result = self._error_of(error, entry)
        for job in jobs:
            job.is_on_device = False
        took_s = self._clock() - began_s
        self._observer.labels_encoded(entry.group, words=len(portion), seconds=took_s)
        with self._lock:
            share = self._shares[entry.group]
            if share:
                self._not_before_s[entry.group] = began_s + took_s / share
            return [] if result is None else self._end(entry, result)

    def _choose(self, now_s: float, *, is_idle: bool) -> _Entry | None:
        """The entry whose labels come next: by lane, and in a lane in turns the oldest and the shortest."""
        for group in GROUPS:
            entries = [entry for entry in self._entries.values() if entry.group is group]
            if entries and (is_idle or (group is not None and now_s >= self._not_before_s[group])):
                self._is_turn_of_oldest = not self._is_turn_of_oldest
                # Neither a long set nor a stream of short ones holds up the others.
                return entries[0] if self._is_turn_of_oldest else min(entries, key=lambda each: each.units)
        return None

    def _take_portion(self, entry: _Entry) -> list[Phrase]:
        """Remove the next labels from an entry, as many as a portion may have; at least one, if one is missing."""
        entry.words |= self._bank.cached_words(entry.label_set, [word for word, _ in entry.missing])
        left = [(word, units) for word, units in entry.missing if word not in entry.words]
        target_s = max(self._limits.portion_s, self._image_s())
        portion: list[Phrase] = []
        sentences = 0
        for phrase, units in left:
            # The labels are sorted, so the newest is the longest, to which the others are padded.
            sentences += len(phrase[0])
            cost_s = self._bank.cost.seconds((len(portion) + 1) * units)
            if portion and (sentences > MAX_TEXTS or cost_s > target_s):
                break
            portion.append(phrase)
        entry.missing = deque(left[len(portion) :])
        entry.units = sum(units for _, units in entry.missing)
        return portion

    def _end(self, entry: _Entry, result: EncodedLabels | ErrorInfo) -> list[Job]:
        """Give the jobs of an entry their labels or the error, and return those that are loaded."""
        # Another entry may have taken the place of one that all its jobs had left.
        if self._entries.get(entry.label_set.text_key) is entry:
            del self._entries[entry.label_set.text_key]
        loaded = [job for job in entry.jobs if job in self._loaded]
        for job in entry.jobs:
            _, label_set = self._waiting.pop(job)
            self._held[job.lane] -= 1
            if isinstance(result, ErrorInfo):
                job.fail(result)
            else:
                job.labels = result if label_set is result.label_set else self._bank.known(label_set)
        self._loaded.difference_update(loaded)
        entry.jobs.clear()
        for on_end in entry.on_end:
            on_end(result)
        return loaded

    def _error_of(self, error: Exception, entry: _Entry) -> ErrorInfo:
        """The error of the jobs that wait for labels on which the model failed.

        Raises:
            FatalError: the device is lost.
        """
        kind = self._error_kind(error)
        if kind is DeviceErrorKind.LOST:
            raise FatalError(ExitCode.DEVICE, f"the device failed: {error}") from error
        is_memory = kind is DeviceErrorKind.OUT_OF_MEMORY
        code = ErrorCode.OUT_OF_MEMORY if is_memory else ErrorCode.ENCODE_FAILED
        text = f"the model failed on these labels ({type(error).__name__}: {error!s:.200})"
        log.warning("labels_failed", name=entry.label_set.name, jobs=len(entry.jobs), error=text)
        return ErrorInfo(code=code, message=text, stage=Stage.SCORE, retryable=is_memory)
