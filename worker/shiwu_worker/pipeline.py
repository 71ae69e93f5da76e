"""The way of a picture: claim → fetch → decode → batch → encode → score → commit.

Read `Pipeline` from top to bottom: its methods stand in the order in which a job meets them. The stages are handed in
by `wiring`; this room knows their verbs, not their libraries. `_held` knows every job between claim and commit.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis import RedisError

from shiwu.contract import ErrorCode, ErrorInfo, ImageInfo, Stage, without_query
from shiwu_worker.errors import ExitCode, FatalError, Rejected
from shiwu_worker.job import Job, Release, open_job
from shiwu_worker.timing import Progress

if TYPE_CHECKING:
    from shiwu_worker.labels import LabelSet
    from shiwu_worker.loader_frames import Loaded
    from shiwu_worker.settle import Away
    from shiwu_worker.stages.batch import Batcher
    from shiwu_worker.stages.claim import Claims, Doorbell

log: Any = structlog.get_logger()
IDLE_S: Final = 5.0
HURRY_S: Final = 0.1
CLAIM_ENDS_S: Final = 10.0
ONCE_MORE_S: Final = 0.1
HELD_FACTOR: Final = 3
"""Jobs between claim and commit are at most this many times the slots."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and with which pauses, a job with one class of error is tried."""

    attempts: int
    first_s: float
    longest_s: float

    def delay_s(self, attempt: int) -> float:
        """The pause after this attempt: doubling, with jitter down to a half, so that jobs do not return together."""
        return min(self.longest_s, self.first_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 no secret


@dataclass(frozen=True, slots=True)
class Limits:
    """What a pipeline may hold, and how patient it is."""

    slots: int
    max_attempts: int
    """How many workers a job may end before it is given up."""
    retries: Mapping[ErrorCode, RetryPolicy] = field(default_factory=dict)
    """Classes of errors that are tried again; all others are answered at once."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The verbs of the way."""

    claims: Claims
    doorbell: Doorbell
    resolve: Callable[[Job], LabelSet]
    load: Callable[[Sequence[tuple[int, Job]]], None]
    batcher: Batcher[Job]
    encode_and_score: Callable[[Sequence[Job]], None]
    settle: Callable[[list[Job]], None]
    away: Away


class Pipeline:
    """Runs the stages from `start` to `stop`.

    Args:
        on_fatal: called, from any thread, when the process can't go on.
        on_claiming: told when claims begin to succeed, and when they end: Redis is away, or we stop.
    """

    def __init__(
        self,
        stages: Stages,
        limits: Limits,
        *,
        progress: Progress,
        on_fatal: Callable[[FatalError], None],
        on_claiming: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._do = stages
        self._limits = limits
        self._on_fatal = on_fatal
        self._on_claiming = on_claiming
        self._is_claiming = False
        self._held: dict[str, Job] = {}
        self._loading: dict[int, Job] = {}
        self._tickets = itertools.count(1)
        self._free = list(range(limits.slots))
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._hurry = False
        self._progress = progress
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in (("claim", self._claim), ("encode", self._encode))
        ]

    # -------------------------------------------------------------------------------- claim
    def _claim(self) -> None:
        alone = False
        while not self._closing.is_set():
            room = self._room(alone)
            if not room:
                continue
            try:
                taken = self._do.claims.claim(room, held=self._held)
            except RedisError as error:
                self._say_claiming(is_so=False)
                self._do.away.wait(error, self._closing)
                continue
            self._do.away.back()
            self._say_claiming(is_so=not self._closing.is_set())
            if not self._held:
                # Claims say nothing of the other threads: with jobs in hand only these moving on is progress.
                self._progress.mark()
            alone = taken.alone
            if taken.jobs:
                self._admit([open_job(one) for one in taken.jobs])
            elif not alone:
                self._do.doorbell.wait(IDLE_S)

    def _admit(self, jobs: list[Job]) -> None:
        """Send each new job to the loaders with a slot of its own, unless its fate is already known."""
        now_s = time.monotonic()
        for job in jobs:
            if job.id in self._held:
                # It came back to its lane and to us while its former life here is being settled.
                job.back = Release(job.id, delay_s=ONCE_MORE_S)
        loading = [job for job in jobs if self._acceptable(job, now_s)]
        with self._changed:
            self._held.update((job.id, job) for job in jobs if job.id not in self._held)
            for job in loading:
                job.slot = self._free.pop()
            tickets = [(next(self._tickets), job) for job in loading]
            self._loading.update(tickets)
        self._settle([job for job in jobs if job.slot < 0])
        if tickets:
            self._do.load(tickets)

    def _acceptable(self, job: Job, now_s: float) -> bool:
        if job.back is not None or job.error is not None or job.unwanted(now_s):
            return False
        if job.due_s > now_s:
            job.back = Release(job.id, delay_s=job.due_s - now_s)
            return False
        if job.deaths >= self._limits.max_attempts:
            text = f"given up: {job.deaths} workers died, hung or lost their device while they held it"
            job.fail(ErrorInfo(code=ErrorCode.ATTEMPTS_EXHAUSTED, message=text, stage=Stage.CLAIM))
            return False
        try:
            job.label_set = self._do.resolve(job)
        except Rejected as error:
            job.fail(error.info())
            return False
        return True

    # -------------------------------------------------------------------------------- fetch, decode
    def loaded(self, results: Sequence[Loaded]) -> None:
        """Take what the loaders made: pixels in the job's slot, or the reason why there are none. Never blocks."""
        ready, ended = [], []
        with self._changed:
            jobs = [self._loading.pop(one.ticket, None) for one in results]
        for one, job in zip(results, jobs, strict=True):
            if job is None or job.request is None:
                continue
            job.moments.fetch_from_s = one.started_s
            job.moments.decode_from_s, job.moments.batch_from_s = one.fetched_s, one.decoded_s
            job.image = ImageInfo(
                reference=without_query(job.request.image),
                format=one.format,
                width=one.width,
                height=one.height,
                bytes=one.n_bytes,
                sha256=one.sha256,
            )
            if one.error is None:
                ready.append(job)
                continue
            job.fail(one.error)
            ended.append(job)
        self._do.batcher.put(ready)
        self._settle(ended)

    # -------------------------------------------------------------------------------- batch, encode, score
    def _encode(self) -> None:
        while not self._ended.is_set():
            batch = self._do.batcher.take(timeout_s=0.5)
            now_s = time.monotonic()
            if live := [job for job in batch if not job.unwanted(now_s)]:
                self._on_device(live)
            if batch:
                self._progress.mark()
                self._settle(batch)

    def _on_device(self, jobs: Sequence[Job]) -> None:
        try:
            self._do.encode_and_score(jobs)
        except BaseException:
            # The try counts: a picture that ends the worker each time must not do so for ever.
            for job in jobs:
                job.is_accused = True
            raise

    # -------------------------------------------------------------------------------- commit
    def _settle(self, jobs: list[Job]) -> None:
        """Free the slots of jobs whose fate is known, and hand them on to be answered or given back. Never blocks."""
        if not jobs:
            return
        for job in jobs:
            self._spare(job)
        with self._changed:
            self._free.extend(job.slot for job in jobs if job.slot >= 0)
            self._changed.notify_all()
        self._do.settle(jobs)

    def _spare(self, job: Job) -> None:
        """Give a failed job another try where its class of error has one left."""
        policy = self._limits.retries.get(job.error.code) if job.error is not None else None
        if policy is not None and job.error is not None and job.attempt < policy.attempts:
            job.back = Release(job.id, delay_s=policy.delay_s(job.attempt), counts=True)
            code = job.error.code.value
            log.info("later", id=job.id, attempt=job.attempt, code=code, delay_s=round(job.back.delay_s, 3))

    def ended(self, ids: Sequence[str]) -> None:
        """Leave these jobs where they are held: somebody has answered them."""
        with self._changed:
            for job_id in ids:
                if (job := self._held.get(job_id)) is not None:
                    job.is_ended = True

    def settled(self, jobs: Sequence[Job]) -> None:
        """Forget jobs that are out of our hands: Redis has their answers, or has them back."""
        self._progress.mark()
        with self._changed:
            for job in jobs:
                if self._held.get(job.id) is job:
                    del self._held[job.id]
            self._changed.notify_all()

    # -------------------------------------------------------------------------------- from start to stop
    def start(self) -> None:
        """Start claiming. Everything handed in must be ready for work."""
        for thread in self._threads:
            thread.start()

    def held(self) -> list[str]:
        """Ids of the jobs between claim and commit, oldest first."""
        with self._changed:
            return list(self._held)

    def stop(self, *, grace_s: float) -> list[Release]:
        """Claim no more, finish what is held within `grace_s`, and return what must be given back.

        The oldest job comes last, so that giving them back to the front of a lane in this order keeps the order.
        """
        self._closing.set()
        self._say_claiming(is_so=False)
        self._do.doorbell.close()
        until_s = time.monotonic() + grace_s
        with self._changed:
            self._changed.notify_all()
        # A claim that is under way brings more jobs; only after it is known what is held.
        self._threads[0].join(timeout=CLAIM_ENDS_S)
        with self._changed:
            # Short waits: a signal handler may not notify, it could interrupt the very thread that holds the lock.
            while self._held and not self._hurry and time.monotonic() < until_s:
                self._changed.wait(HURRY_S)
            left = [Release(job.id, counts=job.is_accused) for job in reversed(self._held.values())]
        self._ended.set()
        self._do.batcher.close()
        for thread in self._threads:
            thread.join(timeout=5.0)
        return left

    def hurry(self) -> None:
        """End a running `stop` at once, whatever is left of its grace. Safe to call from a signal handler."""
        self._hurry = True
        self._closing.set()

    def _room(self, alone: bool) -> int:
        """How many jobs to claim, once there are enough to be worth a round trip; 0 when the wait was in vain.

        `alone` waits until nothing is held: a suspect is worked on with no neighbours. Answers that Redis does not take
        hold no slots, so what is held is bounded too.
        """
        least = max(1, self._limits.slots // 4)

        def room() -> int:
            return min(len(self._free), HELD_FACTOR * self._limits.slots - len(self._held))

        with self._changed:
            self._changed.wait_for(
                lambda: self._closing.is_set() or not self._held or (room() >= least and not alone), IDLE_S
            )
            if self._closing.is_set() or (alone and self._held):
                return 0
            return max(0, room())

    def _say_claiming(self, *, is_so: bool) -> None:
        if is_so != self._is_claiming:
            self._is_claiming = is_so
            self._on_claiming(is_so)

    def _guard(self, loop: Callable[[], None]) -> None:
        """A thread that ends by an error takes the process with it: half a pipeline is a black hole."""
        try:
            loop()
        except FatalError as error:
            self._say_claiming(is_so=False)
            self._on_fatal(error)
        except Exception as error:
            log.exception("thread_failed", thread=threading.current_thread().name)
            self._say_claiming(is_so=False)
            self._on_fatal(FatalError(ExitCode.INTERNAL, f"{type(error).__name__}: {error}"))
