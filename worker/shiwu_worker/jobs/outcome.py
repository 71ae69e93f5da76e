"""The outcome of a job: its committed answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shiwu_worker.jobs.job import Job

if TYPE_CHECKING:
    from shiwu.broker.answers import Entry


class Settled(msgspec.Struct, frozen=True):
    """A job that has its answer."""

    job: Job
    entry: Entry
    commit_s: float
    is_first: bool
    """Whether ours is the answer; else somebody had answered before, and ours was discarded."""
