"""Jobs with the same image share one decode and one vector.

In flight: the first of them is the leader, which goes through the batch. The others follow it: they wait here until its
vector is known, and each is scored with its own labels. A leader that ends without a vector hands its pixels over to a
follower. Afterwards: the vectors of the last images are kept, and a job with one of them is scored immediately.

Two images are the same if the SHA-256 of their files is. One process has one model and one preprocessing, and no vector
leaves it, so no other model or setting is mixed in. Only vectors are shared, never an error. Each job asks for its
own reference; a source that answers "not modified" need not send the bytes of an image whose vector is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from shiwu.contract import Cache, ImageInfo, Lane
from shiwu_worker.pipeline.known_files import KnownFile, KnownFiles
from shiwu_worker.pipeline.vector_cache import VectorCache

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from shiwu_worker.jobs.job import Job
    from shiwu_worker.loaders.shared_memory import KnownImages
    from shiwu_worker.stages.fetch.validators import Validator


class SortedJobs(NamedTuple):
    """Loaded jobs by what comes next for them."""

    to_encode: list[Job]
    known: list[Job]
    """Their vectors are known."""
    unknown: list[Job]
    """They have neither pixels nor a vector, because the image is known no more: they must be loaded again."""
    urgent: list[Job]
    """Leaders from bulk that interactive jobs have begun to follow."""


class SharedImages:
    """The leaders in flight with their followers, and the vectors that are kept. Thread-safe.

    Args:
        max_vectors: most vectors that are kept after their jobs, the last used ones; 0 keeps none.
        known_images: the images that loaders need not decode.
        is_on: False lets every job be computed by itself.
    """

    def __init__(self, *, max_vectors: int, known_images: KnownImages, is_on: bool = True) -> None:
        self._max_vectors = max_vectors
        self._known_images = known_images
        self._is_on = is_on
        self._lock = threading.Lock()
        self._leaders: dict[str, Job] = {}
        self._followers: dict[str, list[Job]] = {}
        self._answerable: list[Job] = []
        """Followers whose vectors are known."""
        self._kept = VectorCache(max_vectors)
        self._files = KnownFiles(max_vectors)

    def __len__(self) -> int:
        return len(self._kept)

    # -------------------------------------------------------------------------------- before and after the fetch
    @property
    def has_files(self) -> bool:
        """Whether any file is known."""
        return len(self._files) > 0

    def known_files(self, references: Sequence[str]) -> list[KnownFile | None]:
        """For each reference the file that it named before, if the vector of that image is kept."""
        with self._lock:
            found = [self._files.find(reference) for reference in references]
            return [file if file is not None and file.sha256 in self._kept.rows else None for file in found]

    def note_file(self, job: Job, validator: Validator) -> None:
        """Remember the validator of the image of a job, which was fetched."""
        with self._lock:
            if job.request is not None and self._max_vectors and self._is_on:
                self._files.note(job.request.image, KnownFile(validator, job.sha256))

    # -------------------------------------------------------------------------------- before the batch
    def sort(self, jobs: Sequence[Job]) -> SortedJobs:
        """Find the jobs whose vectors are known, and let those follow whose images are in flight already."""
        found = SortedJobs([], [], [], [])
        with self._lock:
            leaders, kept, is_on = self._leaders, self._kept.rows, self._is_on
            for job in jobs:
                sha256 = job.sha256
                if sha256 in kept:
                    self._use(job)
                    found.known.append(job)
                elif sha256 in leaders:
                    self._follow(job, leaders[sha256], found.urgent)
                elif job.has_pixels:
                    if is_on:
                        leaders[sha256] = job
                    found.to_encode.append(job)
                else:
                    found.unknown.append(job)
        if found.unknown:
            self._known_images.forget([job.sha256 for job in found.unknown])
        return found

    def _use(self, job: Job) -> None:
        job.shared_vector, image = self._kept.get(job.sha256)
        job.cache = Cache.VECTOR
        _describe(job, image)

    def _follow(self, job: Job, leader: Job, urgent: list[Job]) -> None:
        self._followers.setdefault(job.sha256, []).append(job)
        job.leader = leader
        job.cache = Cache.JOINED
        _describe(job, leader.image)
        if job.lane is Lane.INTERACTIVE and leader.lane is Lane.BULK:
            urgent.append(leader)

    # -------------------------------------------------------------------------------- after the batch
    def encoded(self, jobs: Sequence[Job], vectors: NDArray[float32]) -> None:
        """Take the vectors (n, d) of these jobs: for their followers, and for later jobs with the same image."""
        with self._lock:
            if not self._is_on:
                return
            for job in jobs:
                self._leaders.pop(job.sha256, None)
            if self._followers:
                for job, vector in zip(jobs, vectors, strict=True):
                    self._release_followers(job, vector)
            if self._max_vectors:
                self._kept.put([job.sha256 for job in jobs], [job.image for job in jobs], vectors)
            dropped = self._kept.take_dropped()
        if dropped:
            self._known_images.forget(dropped)

    def take_answerable(self) -> list[Job]:
        """The followers whose vectors have become known since the last call."""
        if not self._answerable:
            return []
        with self._lock:
            taken, self._answerable = self._answerable, []
        return taken

    def _release_followers(self, leader: Job, vector: NDArray[float32]) -> None:
        followers = self._followers.pop(leader.sha256, [])
        for job in followers:
            job.leader, job.shared_vector, job.batch_size = None, vector.copy(), leader.batch_size
        self._answerable += followers

    # -------------------------------------------------------------------------------- when a leader ends
    def hand_over(self, job: Job) -> Job | None:
        """End the leadership of a job that gets no vector. Returns the follower that has its pixels now, if any."""
        with self._lock:
            if self._leaders.get(job.sha256) is not job:
                return None
            followers = self._followers.get(job.sha256, [])
            successor = followers.pop(0) if followers else None
            if not followers:
                self._followers.pop(job.sha256, None)
            if successor is None:
                del self._leaders[job.sha256]
            else:
                self._leaders[job.sha256] = successor
                successor.leader, successor.cache = None, None
                for follower in followers:
                    follower.leader = successor
                if not successor.has_pixels:
                    successor.slot, job.slot = job.slot, successor.slot
                    successor.has_pixels, job.has_pixels = True, False
        if successor is None:
            self._known_images.forget([job.sha256])
        return successor

    def close(self) -> None:
        """Drop all vectors and share nothing from now on: the device may have computed wrong ones."""
        with self._lock:
            self._is_on = False
            self._leaders.clear()
            self._followers.clear()
            self._answerable.clear()
            self._kept.clear()
            self._files.clear()


def _describe(job: Job, image: ImageInfo | None) -> None:
    """Give a job whose image was not decoded the facts of the same image."""
    if job.image is not None and image is not None and not job.has_pixels:
        job.image = ImageInfo(
            reference=job.image.reference,
            format=image.format,
            width=image.width,
            height=image.height,
            bytes=image.bytes,
            sha256=image.sha256,
        )
