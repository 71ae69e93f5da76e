"""What one look at the service shows, as plain data; `shiwu top --json` prints it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shiwu.broker.worker_state import WorkerState
from shiwu.client.results import TagResult
from shiwu.contract import Lane


class LaneLook(msgspec.Struct, frozen=True):
    """One lane."""

    lane: Lane
    waiting: int
    claimed: int
    in_per_s: float | None
    """Jobs that entered the lane, each second; None until two counts are known."""
    out_per_s: float | None
    """Answers of its jobs, each second: those of all lanes, divided as the newest answers are."""
    oldest_s: float | None
    """Age of the oldest waiting message; None where none waits."""
    backlog_s: float
    """Estimate of how long the workers need until the lane is empty."""
    history: tuple[int, ...]
    """Waiting messages in steps of five seconds, the newest last; up to five minutes."""


class StageLook(msgspec.Struct, frozen=True):
    """One stage in the newest answers."""

    stage: str
    p50_ms: float
    p95_ms: float
    share: float
    """Its part of the time of these answers, 0 to 1."""


class WorkerLook(msgspec.Struct, frozen=True):
    """One worker with a heartbeat in the last ten seconds."""

    name: str
    state: WorkerState | None
    """What it tells of itself; None for a worker of an older version."""


class FailureLook(msgspec.Struct, frozen=True):
    """The newest dead letters with one error code."""

    code: str
    count: int
    newest_s: float
    """Seconds since the newest of them ended."""
    stage: str
    """The stage of the newest one; empty where it has none."""


class BackfillLook(msgspec.Struct, frozen=True):
    """One backfill."""

    name: str
    phase: str
    is_run: bool
    """Whether a process runs it now."""
    read: int
    sent: int
    answered: int
    without_tags: int


class ShardLook(msgspec.Struct, frozen=True):
    """One shard of a cluster. While it is unavailable its figures are those of the last look."""

    index: int
    node: str
    """`host:port` of the node that has it; empty where no node says so."""
    interactive: int
    """Waiting messages of this lane."""
    bulk: int
    claimed: int
    delayed: int
    quarantined: int
    dead: int
    answers_per_s: float | None
    problem: str | None
    """Why it did not answer; None where it did."""


class Look(msgspec.Struct, frozen=True):
    """The service at one moment, by Redis' clock. While Redis is unavailable the figures are those of the last look."""

    at_ms: float = 0.0
    problem: str | None = None
    """Why Redis did not answer; None where it did."""
    away_s: float = 0.0
    """For how long it has not answered."""
    answers_per_s: float | None = None
    answered: int = 0
    """Total since the database is in use."""
    delayed: int = 0
    quarantined: int = 0
    dead: int = 0
    lanes: tuple[LaneLook, ...] = ()
    stages: tuple[StageLook, ...] = ()
    sample: int = 0
    """How many answers the stages are from."""
    workers: tuple[WorkerLook, ...] = ()
    failures: tuple[FailureLook, ...] = ()
    dead_read: int = 0
    """How many dead letters, the newest, the failures are from."""
    backfills: tuple[BackfillLook, ...] = ()
    shards: tuple[ShardLook, ...] = ()
    """Each shard of a cluster; empty on one server."""

    @property
    def images_per_s(self) -> float:
        """What all workers encode each second."""
        return sum(worker.state.images_per_s for worker in self.workers if worker.state is not None)


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter, without its message."""

    id: str
    died_ms: float
    result: TagResult

    @property
    def code(self) -> str:
        """The error code, or the status of an answer without one."""
        return str(self.result.error.code if self.result.error is not None else self.result.status)

    @property
    def stage(self) -> str:
        """The stage in which the job failed; empty where the error names none."""
        error = self.result.error
        return str(error.stage) if error is not None and error.stage is not None else ""
