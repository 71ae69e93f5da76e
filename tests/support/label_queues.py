"""A label queue over a label bank, with a text tower that moves the clock of the test."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shiwu.contract import Lane
from shiwu_worker.errors import DeviceErrorKind
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_checks import LabelTokens
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.pipeline.admission import Admit
from shiwu_worker.pipeline.label_queue import LabelQueue
from shiwu_worker.policy.limits import LabelLimits
from shiwu_worker.stages.score.label_bank import LabelBank
from tests.support.clock import Clock
from tests.support.observers import RecordingObserver

TEXT_S = 0.001
LIMITS = LabelLimits()
CONFIGURED = LabelSet("mine", tuple(f"k{number:03}" for number in range(100)))
_numbers = itertools.count()


class ClockedTower:
    """A text tower that takes TEXT_S for each text, by the clock of the test."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.texts: list[str] = []
        self.errors: dict[str, Exception] = {}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Take the time of these texts."""
        self.clock.now_s += TEXT_S * len(texts)
        for text in texts:
            if text in self.errors:
                raise self.errors[text]
        self.texts += texts
        return np.stack([np.array([1.0, len(self.texts)], np.float32) for _ in texts])

    def tokens(self, labels: Sequence[str]) -> list[LabelTokens]:
        """A token for each letter."""
        return [LabelTokens(tuple(map(ord, label)), is_readable=True) for label in labels]


class QueueParts:
    """A label queue over a label bank, with a clock that only the tower moves."""

    def __init__(self, *, limits: LabelLimits = LIMITS, sets: Sequence[LabelSet] = ()) -> None:
        self.clock = Clock()
        self.tower = ClockedTower(self.clock)
        self.observer = RecordingObserver()
        self.image_s = 0.0
        self.bank = LabelBank(
            sets={str(label_set.name): label_set for label_set in sets},
            default="",
            encode_texts=self.tower.encode,
            label_tokens=self.tower.tokens,
            max_cached=100,
            has_bias=True,
            clock=self.clock.monotonic,
        )
        self.bank.encoded(words(100))
        self.tower.texts.clear()
        self.queue = LabelQueue(
            self.bank,
            limits,
            error_kind=self._kind,
            image_s=lambda: self.image_s,
            observer=self.observer,
            clock=self.clock.monotonic,
        )

    @staticmethod
    def _kind(error: BaseException) -> DeviceErrorKind:
        return DeviceErrorKind[str(error)] if str(error) in DeviceErrorKind.__members__ else DeviceErrorKind.OTHER

    def admit(self, label_set: LabelSet, lane: Lane = Lane.BULK) -> Job:
        """Admit a job that has room, and note that its image is loaded."""
        job = make_job(lane)
        decision = self.queue.admit(job, label_set)
        assert isinstance(decision, Admit)
        job.label_set, job.labels = decision.label_set, decision.labels
        if job.labels is None:
            assert self.queue.loaded([job]) == []
        return job

    def portion(self, *, is_idle: bool = True) -> tuple[list[Job], float]:
        """Run a portion; return the jobs that can go on, and how long it took."""
        began_s = self.clock.now_s
        return self.queue.run_portion(is_idle=is_idle), self.clock.now_s - began_s

    def finish(self) -> list[Job]:
        """Run portions until nothing is left; return the jobs in the order in which they could go on."""
        found: list[Job] = []
        while self.queue.wait_s(is_idle=True) is not None:
            found += self.portion()[0]
        return found


def make_job(lane: Lane, *, expires_s: float | None = None) -> Job:
    """A job that was claimed."""
    moments = StageTimestamps(claimed_s=0.0)
    return Job(id=f"j{next(_numbers)}", key=lane.queue, attempt=1, raw=b"", moments=moments, expires_s=expires_s)


def words(count: int) -> LabelSet:
    """New labels of equal length."""
    first = next(_numbers) * 10_000
    return LabelSet(None, tuple(f"w{first + number:09}" for number in range(count)))
