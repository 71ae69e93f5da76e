"""The main path of a job: claim → fetch → decode → batch → encode → score → commit.

The methods of `Pipeline` stand in the order in which a job passes through them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from shiwu.contract import AttemptEnd, source_of
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.jobs.job import Job, Release
from shiwu_worker.jobs.outcome import Answered, CommittedJob, Outcome, Released
from shiwu_worker.loaders.protocol import LoadFailed, LoadTask
from shiwu_worker.pipeline.admission import Admission, Admit, Decision, Defer, Reject
from shiwu_worker.pipeline.load_results import record
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from shiwu_worker.loaders.pool import LoaderPool
    from shiwu_worker.loaders.protocol import LoadResult
    from shiwu_worker.pipeline.batch_executor import BatchExecutor, LaunchedBatch
    from shiwu_worker.pipeline.claimer import Claimer
    from shiwu_worker.pipeline.in_flight import InFlightJobs
    from shiwu_worker.pipeline.label_queue import LabelQueue
    from shiwu_worker.pipeline.observer import PipelineObserver
    from shiwu_worker.pipeline.sharded_committer import ShardedCommitter
    from shiwu_worker.pipeline.shared_images import SharedImages
    from shiwu_worker.runtime.progress import LoadMeter, Progress
    from shiwu_worker.stages.batch import Batcher
    from shiwu_worker.stages.commit import Committer

POLL_INTERVAL_S: Final = 0.5
CLAIM_TIMEOUT_S: Final = 1.0
"""How long `stop` waits for a claim that is under way."""
THREAD_TIMEOUT_S: Final = 5.0
"""How long `stop` waits for the batch on the device, after the grace time."""
STILL_IN_FLIGHT_DELAY_S: Final = 0.1
"""Pause of a job that came back while its previous attempt is still being committed by this worker."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts that a job passes through, in this order."""

    claimer: Claimer
    admission: Admission
    labels: LabelQueue
    """Jobs whose labels are being encoded."""
    loaders: LoaderPool
    """Fetch and decode."""
    shared: SharedImages
    """Jobs with the same image: one of them is encoded."""
    batcher: Batcher[Job]
    check_canary: Callable[[], None]
    """Called between two batches; raises FatalError when the device computes wrong results."""
    executor: BatchExecutor
    """Encode and score."""
    committer: Committer | ShardedCommitter


class Pipeline:
    """Runs the stages from `start` to `stop`.

    Args:
        in_flight: holds every job between claim and commit.
        on_fatal: called, from any thread, when the process cannot go on.
    """

    def __init__(
        self,
        stages: Stages,
        in_flight: InFlightJobs,
        *,
        progress: Progress,
        meter: LoadMeter,
        observer: PipelineObserver,
        on_fatal: Callable[[FatalError], None],
    ) -> None:
        self._stages = stages
        self._in_flight = in_flight
        self._progress = progress
        self._meter = meter
        self._observer = observer
        self._on_fatal = on_fatal
        self._launched: queue.Queue[LaunchedBatch] = queue.Queue(1)
        self._ended = threading.Event()
        self._is_hurried = False
        self._encode_round_s = time.monotonic()
        loops = {"claim": lambda: stages.claimer.run(self._admit), "encode": self._encode, "score": self._score}
        self.threads = [ServiceThread(name, loop, on_fatal=self._fail) for name, loop in loops.items()]

    # -------------------------------------------------------------------------------- claim
    def _admit(self, jobs: Sequence[Job]) -> None:
        """Send each new job to the loaders with a slot of its own, unless its attempt ends here."""
        now_s = time.monotonic()
        admitted: list[Job] = []
        ended: list[Outcome] = []
        for job in jobs:
            match self._decide(job, now_s):
                case Admit(label_set=label_set, labels=labels):
                    job.label_set = label_set
                    if labels is not None:
                        job.labels = labels
                    admitted.append(job)
                case Reject(error=error):
                    job.fail(error)
                    ended.append(self._outcome(job))
                case Defer(delay_s=delay_s):
                    ended.append(Released(job, Release(job.id, delay_s=delay_s, shard=job.shard)))
        tickets = self._in_flight.add(jobs, admitted)
        self._finish(ended)
        if len(self._stages.labels):
            self._stages.batcher.wake()
        if tickets:
            self._load(tickets)

    def _decide(self, job: Job, now_s: float) -> Decision:
        if job.id in self._in_flight:
            return Defer(STILL_IN_FLIGHT_DELAY_S)
        decision = self._stages.admission.check(job, now_s)
        return self._stages.labels.admit(job, decision.label_set) if isinstance(decision, Admit) else decision

    # -------------------------------------------------------------------------------- fetch, decode
    def _load(self, tickets: Sequence[tuple[int, Job]]) -> None:
        """Let the loaders fetch and decode; a source that has the same file as before need not send it."""
        tasks = [
            LoadTask(ticket, job.slot, job.request.image, job.lane, source_of(job.request.image))
            for ticket, job in tickets
            if job.request is not None
        ]
        if self._stages.shared.has_files:
            files = self._stages.shared.known_files([task.image for task in tasks])
            tasks = [
                task if file is None else replace(task, validator=file.validator, sha256=file.sha256)
                for task, file in zip(tasks, files, strict=True)
            ]
        self._stages.loaders.submit(tasks)

    def _load_again(self, jobs: Sequence[Job]) -> None:
        """Load images of which the worker has neither pixels nor a vector, although it seemed to know them."""
        tasks: list[LoadTask] = []
        for ticket, job in self._in_flight.load_again(jobs):
            if job.request is not None:
                image, source = job.request.image, source_of(job.request.image)
                tasks.append(LoadTask(ticket, job.slot, image, job.lane, source, has_to_be_decoded=True))
        self._stages.loaders.submit(tasks)

    def _loaded(self, results: Sequence[LoadResult]) -> None:
        """Take the loaders' results: pixels in the slot of the job, or an error. Never blocks."""
        fetch_s = decode_s = 0.0
        ready: list[Job] = []
        ended: list[Outcome] = []
        jobs = self._in_flight.match([result.ticket for result in results])
        for result, job in zip(results, jobs, strict=True):
            fetch_s += result.fetched_s - result.started_s
            decode_s += result.decoded_s - result.fetched_s
            if job is not None:
                record(result, job)
                if isinstance(result, LoadFailed):
                    self._stages.labels.discard([job])
                    ended.append(self._outcome(job, result))
                else:
                    ready.append(job)
                    if result.validator is not None:
                        self._stages.shared.note_file(job, result.validator)
        self._meter.loaded(fetch_s=fetch_s, decode_s=decode_s)
        self._put(self._stages.labels.loaded(ready))
        self._finish(ended)

    def _put(self, loaded: Sequence[Job]) -> None:
        """Pass loaded jobs on to the batcher, without those on whose labels the model failed.

        Those whose vectors are known pass it by, and those whose image is in flight already wait for its vector.
        """
        if loaded:
            found = self._stages.shared.sort([job for job in loaded if job.error is None])
            if found.to_encode:
                self._stages.batcher.put(found.to_encode)
            self._finish([self._outcome(job) for job in loaded if job.error is not None])
            if found.urgent:
                self._stages.batcher.prefer(found.urgent)
            if found.unknown:
                self._load_again(found.unknown)
            self._answer_known(found.known)

    # -------------------------------------------------------------------------------- batch, encode
    def _encode(self) -> None:
        while not self._ended.is_set():
            self._encode_round_s = time.monotonic()
            self._stages.check_canary()
            wait_s = self._stages.labels.wait_s(is_idle=self._stages.batcher.is_idle)
            timeout_s = POLL_INTERVAL_S if wait_s is None else min(POLL_INTERVAL_S, wait_s)
            jobs = self._drop_unwanted(self._stages.batcher.take(timeout_s=timeout_s))
            if jobs:
                for job in jobs:
                    job.is_on_device = True
                launched = self._stages.executor.launch(jobs)
                if launched.is_under_way:
                    self._stages.batcher.batch_started()
                self._hand_over(launched)
            self._encode_labels()

    def _encode_labels(self) -> None:
        """Encode a portion of the labels that jobs wait for, if it is time for one."""
        labels = self._stages.labels
        self._drop_unwanted(labels.drop_unwanted(time.monotonic()))
        began_s = time.monotonic()
        if labels.wait_s(is_idle=self._stages.batcher.is_idle) == 0.0:
            self._put(labels.run_portion(is_idle=self._stages.batcher.is_idle))
            self._meter.labels_encoded(seconds=time.monotonic() - began_s)
            self._progress.mark()

    def _drop_unwanted(self, batch: Sequence[Job]) -> list[Job]:
        """The jobs of a batch whose producers still wait; the attempts of the others end here.

        A follower of such a job takes its place.
        """
        now_s = time.monotonic()
        wanted: list[Job] = []
        ended: list[Outcome] = []
        for each in batch:
            job: Job | None = each
            while job is not None:
                if job.is_answered_elsewhere:
                    ended.append(Released(job, Release(job.id, shard=job.shard)))
                elif (error := job.expiry(now_s)) is not None:
                    job.fail(error)
                    ended.append(self._outcome(job))
                else:
                    wanted.append(job)
                    break
                job = self._stages.shared.hand_over(job)
        self._finish(ended)
        return wanted

    def _hand_over(self, launched: LaunchedBatch) -> None:
        # One batch waits here, one in the queue, and one is scored: this bounds the batches in flight.
        while not self._ended.is_set():
            try:
                self._launched.put(launched, timeout=POLL_INTERVAL_S)
            except queue.Full:
                continue
            return

    # -------------------------------------------------------------------------------- encode, score
    def _score(self) -> None:
        encoded_s = 0.0
        while not (self._ended.is_set() and self._launched.empty()):
            try:
                launched = self._launched.get(timeout=POLL_INTERVAL_S)
            except queue.Empty:
                continue
            if launched.is_under_way:
                launched.wait()
                self._stages.batcher.batch_done()
            self._stages.executor.finish(launched)
            if launched.jobs:
                # Batches overlap on the way to the device, which works on one at a time.
                started_s = max(encoded_s, launched.started_s)
                encoded_s = launched.jobs[0].moments.score_from_s or time.monotonic()
                self._meter.encoded(images=len(launched.jobs), seconds=max(0.0, encoded_s - started_s))
            for job in launched.jobs:
                job.is_on_device = False
            self._progress.mark()
            # Before their slots are free: a follower of a failed job gets its pixels.
            failed = [job for job in launched.jobs if job.error is not None]
            successors = [each for job in failed if (each := self._stages.shared.hand_over(job)) is not None]
            self._finish([Answered(job) if job.error is None else self._outcome(job) for job in launched.jobs])
            if successors:
                self._stages.batcher.put(successors)
            self._answer_known(self._stages.shared.take_answerable())

    def _answer_known(self, jobs: Sequence[Job]) -> None:
        """Score jobs whose vectors are known, because another job encoded their image."""
        wanted = self._drop_unwanted(jobs) if jobs else []
        if wanted:
            self._stages.executor.score_known(wanted)
            self._progress.mark()
            self._finish([Answered(job) if job.error is None else self._outcome(job) for job in wanted])
            savings = Counter("not_modified" if job.is_not_modified else str(job.cache) for job in wanted)
            for by, count in savings.items():
                self._observer.images_saved(by, count)

    # -------------------------------------------------------------------------------- commit
    def _outcome(self, job: Job, result: LoadFailed | None = None) -> Outcome:
        """How the attempt of a failed job ends: with its error, or with a release where another attempt is allowed."""
        release = self._stages.admission.next_attempt(job, result)
        return Answered(job) if release is None else Released(job, release)

    def _finish(self, outcomes: Sequence[Outcome]) -> None:
        """Free the slots of jobs whose attempt has ended, and pass the jobs on to the commit stage. Never blocks."""
        if outcomes:
            self._in_flight.free_slots([outcome.job for outcome in outcomes])
            self._stages.committer.put(outcomes)

    def committed(self, committed: Sequence[CommittedJob]) -> None:
        """Forget jobs whose answers Redis has. For the commit thread."""
        self._progress.mark()
        self._in_flight.remove([each.job for each in committed])
        self._observer.jobs_committed(committed)

    def released(self, released: Sequence[Released]) -> None:
        """Forget jobs that Redis has back. For the commit thread."""
        self._progress.mark()
        self._in_flight.remove([each.job for each in released])
        self._observer.jobs_released(released)

    # -------------------------------------------------------------------------------- from start to stop
    def start(self) -> None:
        """Start claiming. The threads of the stages must run already."""
        self._stages.loaders.subscribe(self._loaded)
        for thread in self.threads:
            thread.start()

    def encode_age_s(self) -> float:
        """Seconds since the encode thread began its last round; an idle one begins a round twice a second."""
        return time.monotonic() - self._encode_round_s

    def stop(self, *, grace_s: float) -> list[Release]:
        """Claim no more, finish what is in flight within `grace_s`, and return the releases of what is left.

        The oldest job comes last: released to the front of a lane in this order, jobs keep their order.
        """
        until_s = time.monotonic() + grace_s
        self._stages.claimer.close()
        # The jobs of a claim that has just been made are known afterwards. One that takes longer is given up.
        claim, *others = self.threads
        claim.join(min(CLAIM_TIMEOUT_S, grace_s))
        self._in_flight.wait_until_empty(until_s=until_s, is_hurried=lambda: self._is_hurried)
        left = [_release_of(job) for job in reversed(self._in_flight.jobs())]
        self._ended.set()
        self._stages.batcher.close()
        joined_until_s = time.monotonic() + THREAD_TIMEOUT_S
        for thread in others:
            thread.join(max(0.0, joined_until_s - time.monotonic()))
        return left

    def hurry(self) -> None:
        """End the grace time of a running `stop`. May be called from a signal handler."""
        self._is_hurried = True

    def _fail(self, error: FatalError) -> None:
        # The attempt of what is on the device counts: an image that crashes one worker must not crash one after
        # another. After a failed canary it does not count, because then the device is the cause.
        for job in self._in_flight.jobs():
            job.is_suspected = (job.leader or job).is_on_device and error.exit_code is not ExitCode.CANARY
        self._stages.shared.close()
        self._stages.claimer.report(active=False)
        self._on_fatal(error)


def _release_of(job: Job) -> Release:
    """How a job goes back that this worker does not finish."""
    ending = AttemptEnd.WORKER_LOST if job.is_suspected else AttemptEnd.WORKER_STOPPED
    return Release(job.id, counts=job.is_suspected, ending=f"{ending}|", shard=job.shard)
