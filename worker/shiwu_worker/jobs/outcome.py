"""How an attempt of a job ends: with an answer, or with its release to Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec

from shiwu_worker.jobs.job import Job, Release

if TYPE_CHECKING:
    from shiwu.broker.answers import AnswerEntry


class Answered(msgspec.Struct, frozen=True, gc=False):
    """The job has its tags or its error, which the commit stage writes as its answer."""

    job: Job


class Released(msgspec.Struct, frozen=True, gc=False):
    """The job goes back to Redis without an answer."""

    job: Job
    release: Release


Outcome: TypeAlias = Answered | Released


class CommittedJob(msgspec.Struct, frozen=True):
    """A job whose answer Redis has."""

    job: Job
    entry: AnswerEntry
    commit_s: float
    """How long the commit took that wrote the answer."""
    is_first: bool
    """Whether this is the answer of the job. Otherwise it was answered before, and this answer was discarded."""
