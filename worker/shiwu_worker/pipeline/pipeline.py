"""The way of a picture: claim → fetch → decode → batch → encode → score → commit.

Read `Pipeline` from top to bottom: its methods stand in the order in which a job meets them. The stages are handed in
by `wiring`; this room knows their verbs, not their libraries. `_in_flight` knows every job between claim and commit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis import RedisError

from shiwu.broker.redis_errors import explain, info_of
from shiwu.contract import AttemptEnd, ErrorInfo, ImageInfo, log_level_of, without_query
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Job, Release, open_job
from shiwu_worker.pipeline.admission import Admission
from shiwu_worker.pipeline.in_flight import InFlightJobs
from shiwu_worker.policy.retry import PipelineLimits
from shiwu_worker.runtime.progress import LoadMeter, Progress

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.loaders.protocol import LoadResult
    from shiwu_worker.pipeline.batch_executor import LaunchedBatch
    from shiwu_worker.runtime.backoff import RedisBackoff
    from shiwu_worker.stages.batch import Batcher
    from shiwu_worker.stages.claim.lease_queue import LeaseQueue
    from shiwu_worker.stages.claim.notifier import LaneNotifier

log: Any = structlog.get_logger()
IDLE_S: Final = 5.0
POLL_INTERVAL_S: Final = 0.5
CLAIM_ENDS_S: Final = 10.0
THREADS_END_S: Final = 5.0
ONCE_MORE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Stages:
    """The verbs of the way."""

    lease_queue: LeaseQueue
    notifier: LaneNotifier
    resolve: Callable[[Job], LabelSet]
    check_callbacks: Callable[[Job], None]
    load: Callable[[Sequence[tuple[int, Job]]], None]
    batcher: Batcher[Job]
    launch: Callable[[Sequence[Job]], LaunchedBatch]
    """Start a batch on the device."""
    finish: Callable[[LaunchedBatch], None]
    """Wait for its vectors and score them: each job then has its tags, or the reason why it has none."""
    settle: Callable[[list[Job]], None]
    backoff: RedisBackoff
    canary: Callable[[], None] = lambda: None
    """Between two batches: the known picture, where its time has come. Raises FatalError for a wrong answer."""


class Pipeline:
    """Runs the stages from `start` to `stop`.

    Args:
        on_fatal: called, from any thread, when the process can't go on.
        on_claiming: told when claims begin to succeed, and when they end: Redis is away, or we stop.
    """

    def __init__(
        self,
        stages: Stages,
        limits: PipelineLimits,
        *,
        progress: Progress,
        meter: LoadMeter,
        on_fatal: Callable[[FatalError], None],
        on_claiming: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._do = stages
        self._admission = Admission(limits, stages.resolve, check_callbacks=stages.check_callbacks)
        self._progress = progress
        self._meter = meter
        self._on_fatal = on_fatal
        self._on_claiming = on_claiming
        self._is_claiming = False
        self._has_claimed = False
        self._zone = limits.zone
        self._in_flight = InFlightJobs(slots=limits.slots, wanted=limits.wanted)
        self._flights: queue.Queue[tuple[list[Job], LaunchedBatch]] = queue.Queue(1)
        self._closing, self._ended = threading.Event(), threading.Event()
        self._is_hurried = False
        self._came_round_s = time.monotonic()
        self._claimer, self._encoder, self._scorer = self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in (("claim", self._claim), ("encode", self._encode), ("score", self._score))
        ]

    # -------------------------------------------------------------------------------- claim
    def _claim(self) -> None:
        alone = False
        while not self._closing.is_set():
            room = self._in_flight.wait_room(is_alone=alone, is_closing=self._closing.is_set, timeout_s=IDLE_S)
            if not room:
                continue
            try:
                taken = self._do.lease_queue.claim(room, held=self._in_flight)
            except RedisError as error:
                self._say_claiming(active=False)
                if not self._has_claimed and info_of(error).ends_start:
                    raise FatalError(ExitCode.CONFIG, f"SHIWU_REDIS_URL: {explain(error)}") from error
                self._do.backoff.wait(error, self._closing)
                continue
            self._has_claimed = True
            self._do.backoff.back()
            self._say_claiming(active=not self._closing.is_set())
            if not self._in_flight:
                # Claims say nothing of the other threads: with jobs in hand only these moving on is progress.
                self._progress.mark()
            alone = taken.alone
            if taken.jobs:
                self._admit([open_job(one, zone=self._zone) for one in taken.jobs])
            elif not alone:
                idle_from_s = time.monotonic()
                self._do.notifier.wait(IDLE_S)
                if not self._in_flight:
                    self._meter.idle(time.monotonic() - idle_from_s)

    def _admit(self, jobs: list[Job]) -> None:
        """Send each new job to the loaders with a slot of its own, unless its fate is already known."""
        now_s = time.monotonic()
        for job in jobs:
            if job.id in self._in_flight:
                # It came back to its lane and to us while its former life here is being settled.
                job.back = Release(job.id, delay_s=ONCE_MORE_S)
        tickets = self._in_flight.take(jobs, [job for job in jobs if self._admission.admits(job, now_s)])
        self._settle([job for job in jobs if job.slot < 0])
        if tickets:
            self._do.load(tickets)

    # -------------------------------------------------------------------------------- fetch, decode
    def loaded(self, results: Sequence[LoadResult]) -> None:
        """Take what the loaders made: pixels in the job's slot, or the reason why there are none. Never blocks."""
        self._meter.loaded(
            fetch_s=sum(one.fetched_s - one.started_s for one in results),
            decode_s=sum(one.decoded_s - one.fetched_s for one in results),
        )
        ready, failed = [], []
        jobs = self._in_flight.loaded([one.ticket for one in results])
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
            else:
                job.fail(one.error)
                job.is_final = one.is_final
                job.retry_after_s, job.is_untried = one.retry_after_s, one.is_untried
                _log_failure(job, one.error, one.detail)
                failed.append(job)
        if ready:
            self._do.batcher.put(ready)
        self._settle(failed)

    # -------------------------------------------------------------------------------- batch, encode
    def _encode(self) -> None:
        while not self._ended.is_set():
            self._came_round_s = time.monotonic()
            self._do.canary()
            batch = self._do.batcher.take(timeout_s=POLL_INTERVAL_S)
            now_s = time.monotonic()
            live = [job for job in batch if not job.unwanted(now_s)]
            if batch:
                for job in live:
                    job.is_on_device = True
                launched = self._do.launch(live)
                if launched.is_under_way:
                    self._do.batcher.batch_started()
                self._hand_over(batch, launched)

    def _hand_over(self, batch: list[Job], launched: LaunchedBatch) -> None:
        # One waits here, one in the queue, one is scored: no more are on their way at a time.
        while not self._ended.is_set():
            try:
                self._flights.put((batch, launched), timeout=POLL_INTERVAL_S)
            except queue.Full:
                continue
            return

    # -------------------------------------------------------------------------------- encode, score
    def _score(self) -> None:
        landed_s = 0.0
        while not (self._ended.is_set() and self._flights.empty()):
            try:
                batch, launched = self._flights.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                continue
            if launched.is_under_way:
                launched.wait()
                self._do.batcher.batch_done()
            self._do.finish(launched)
            if launched.jobs:
                # Batches overlap on their way; the device works on one at a time.
                began_s = max(landed_s, launched.started_s)
                landed_s = launched.jobs[0].moments.score_from_s or time.monotonic()
                self._meter.encoded(pictures=len(launched.jobs), seconds=max(0.0, landed_s - began_s))
            for job in batch:
                job.is_on_device = False
            self._progress.mark()
            self._settle(batch)

    # -------------------------------------------------------------------------------- commit
    def _settle(self, jobs: list[Job]) -> None:
        """Free the slots of jobs whose fate is known, and hand them on to be answered or given back. Never blocks."""
        if jobs:
            for job in jobs:
                self._admission.spare(job)
            self._in_flight.free_slots(jobs)
            self._do.settle(jobs)

    def ended(self, ids: Sequence[str]) -> None:
        """Leave these jobs where they are held: somebody has answered them."""
        self._in_flight.end(ids)

    def settled(self, jobs: Sequence[Job]) -> None:
        """Forget jobs that are out of our hands: Redis has their answers, or has them back."""
        self._progress.mark()
        self._in_flight.remove(jobs)

    # -------------------------------------------------------------------------------- from start to stop
    def start(self) -> None:
        """Start claiming. Everything handed in must be ready for work."""
        for thread in self._threads:
            thread.start()

    def held(self) -> list[str]:
        """Ids of the jobs between claim and commit, oldest first."""
        return self._in_flight.ids()

    def encode_age_s(self) -> float:
        """Seconds since the thread that feeds the device came round; idle, it does so all the time."""
        return time.monotonic() - self._came_round_s

    def stop(self, *, grace_s: float) -> list[Release]:
        """Claim no more, finish what is held within `grace_s`, and return what must be given back.

        The oldest job comes last, so that giving them back to the front of a lane in this order keeps the order.
        """
        self._closing.set()
        self._say_claiming(active=False)
        self._do.notifier.close()
        until_s = time.monotonic() + grace_s
        self._in_flight.wake()
        # A claim that is under way brings more jobs; only after it is known what is held.
        if self._claimer.is_alive():
            self._claimer.join(timeout=CLAIM_ENDS_S)
        self._in_flight.wait_empty(until_s=until_s, is_hurried=lambda: self._is_hurried)
        left = [_release_of(job) for job in reversed(self._in_flight.jobs())]
        self._ended.set()
        self._do.batcher.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=THREADS_END_S)
        return left

    def hurry(self) -> None:
        """End a running `stop` at once, whatever is left of its grace. Safe to call from a signal handler."""
        self._is_hurried = True

    def _say_claiming(self, *, active: bool) -> None:
        if active != self._is_claiming:
            self._is_claiming = active
            self._on_claiming(active)

    def _guard(self, loop: Callable[[], None]) -> None:
        """A thread that ends by an error takes the process with it: half a pipeline is a black hole."""
        try:
            loop()
        except FatalError as error:
            self._give_up(error)
        except Exception as error:  # border: half a pipeline is a black hole
            log.exception("thread_failed", thread=threading.current_thread().name)
            self._give_up(FatalError(ExitCode.INTERNAL, f"{type(error).__name__}: {error}"))

    def _give_up(self, error: FatalError) -> None:
        # The try of what is on the device counts: a picture that ends one worker must not end one after another.
        # Not so where the known picture told of the device: that no job of ours is to blame is what it is for.
        for job in self._in_flight.jobs():
            job.is_accused = job.is_on_device and error.exit_code is not ExitCode.CANARY
        self._say_claiming(active=False)
        self._on_fatal(error)


def _log_failure(job: Job, error: ErrorInfo, detail: str | None) -> None:
    level = log_level_of(error.code)
    if detail is not None or level != "info":
        getattr(log, level)("source_failed", id=job.log_id, code=str(error.code), detail=detail or error.message)


def _release_of(job: Job) -> Release:
    """How a job goes back that this worker does not finish."""
    ending = AttemptEnd.WORKER_LOST if job.is_accused else AttemptEnd.WORKER_STOPPED
    return Release(job.id, counts=job.is_accused, ending=f"{ending}|")
