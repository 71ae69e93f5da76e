"""The outcome of a job: its committed answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shiwu_worker.jobs.job import Job

if TYPE_CHECKING:
    from shiwu.broker.answers import AnswerEntry


class CommittedJob(msgspec.Struct, frozen=True):
    """A job that has its answer."""

    job: Job
    entry: AnswerEntry
    commit_s: float
    is_first: bool
    """Whether ours is the answer; else somebody had answered before, and ours was discarded."""
