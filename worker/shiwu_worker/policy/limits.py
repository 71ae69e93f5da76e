"""What the operator allows of fetching, decoding and claiming: limits and options as plain values.

The settings make these values, and the stages and loaders use them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from shiwu.contract import Lane

LABEL_JOBS_PER_LANE: Final = 16
"""Jobs of one lane that may wait for long until their labels are encoded."""
LABEL_SLOTS: Final = LABEL_JOBS_PER_LANE * len(Lane)
"""Slots of such jobs, besides those of others."""
S3Client = Literal["boto3", "obstore"]
S3Addressing = Literal["auto", "path", "virtual"]


@dataclass(frozen=True, slots=True)
class LeaseOptions:
    """How a worker claims jobs and keeps them."""

    lease_s: float
    bulk_share: float = 0.1
    """Share of the jobs of a claim that bulk gets although interactive jobs wait, 0 to 1."""
    lanes: tuple[Lane, ...] = tuple(Lane)
    """The lanes that are served; quarantined jobs are taken from all."""


@dataclass(frozen=True, slots=True)
class LoadShares:
    """How loader threads and slots are divided between lanes and sources."""

    interactive_reserve: float = 0.25
    """Share that bulk never gets, 0 to 1; 0 where one lane is served only."""
    bulk_share: float = 0.1
    """Share of the threads that become free which bulk gets although interactive waits, 0 to 1."""
    source_threads: int = 0
    """Threads that one source may hold; 0: half of them, and all of them once it has proved quick."""

    slow_s: float = 3.0
    """A fetch that fails after so long kept its thread from other images, and counts against its source."""

    def reserve_of(self, count: int) -> int:
        """How many of `count` threads or slots bulk never gets: at least one of two or more, none of one."""
        if not self.interactive_reserve or count < 2:
            return 0
        return max(1, int(count * self.interactive_reserve))


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits of one fetch."""

    max_bytes: int
    total_timeout_s: float
    connect_timeout_s: float
    read_timeout_s: float
    longest_pause_s: float = 300.0
    """Longest pause that a source may ask for; a longer one is cut to this."""
    max_redirects: int = 3
    min_bytes_per_s: int = 8 * 1024
    """Least average rate of a body, checked from `min_rate_after_s` on; 0: none."""
    min_rate_after_s: float = 5.0


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the object store is (None: the usual AWS chain), and which client reads it."""

    endpoint_url: str | None
    region: str | None
    client: S3Client = "boto3"
    is_anonymous: bool = False
    """Send requests without credentials and signatures."""
    requester_pays: bool = False
    user_agent: str = "shiwu"
    addressing: S3Addressing = "auto"
    """`path`: the bucket is in the path; `virtual`: it is the first part of the host name, where it can be one. `auto`:
    as AWS does, and `path` for stores of the operator."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Limits that are checked in the header, before a pixel is decoded."""

    max_pixels: int
    max_side: int
    formats: tuple[str, ...]
    max_frames: int = 5000
    """Frames of an animation, if its header has their number; only the first few are ever decoded."""
    max_scans: int = 100


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of the process that decodes."""

    memory_bytes: int
    """Its address space. An allocation beyond it fails, and the image is tried again alone."""
    cpu_s: float = 10.0
    """CPU time that decoding one image may take."""
    has_filter: bool = True
    """Whether a system-call filter is installed in the process."""


@dataclass(frozen=True, slots=True)
class LabelLimits:
    """How much of the device new labels of requests may take."""

    max_request_s: float = 60.0
    """Device time that the new labels of one request may take; requests whose labels take longer are rejected."""
    jobs_per_lane: int = LABEL_JOBS_PER_LANE
    """Jobs of one lane that may wait for their labels. More may wait where all labels of the lane take `quick_s`."""
    quick_s: float = 0.25
    portion_s: float = 0.01
    """Aim for one portion of labels. Where the smallest batch of images takes longer, so may a portion."""
    interactive_share: float = 0.5
    """Share of the encode thread's time for labels of interactive jobs while images wait."""
    bulk_share: float = 0.2
    """The same for labels of bulk jobs."""
