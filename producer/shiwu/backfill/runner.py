"""Runs one backfill in this process: sends, collects, watches the clock and the operator's wishes, and ends.

One thread does all of it in turns, so that a part never speaks of a portion that is half registered.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any, Final

import msgspec
import redis

from shiwu.backfill.collector import Collector, refused_jobs
from shiwu.backfill.entries import JobMaker, KeptRecord
from shiwu.backfill.errors import StateLost, TakenOver, UnusableState
from shiwu.backfill.feeder import Feeder
from shiwu.backfill.open_jobs import OpenJobs, RecentJobs
from shiwu.backfill.plan import Pace, Window, read_window
from shiwu.backfill.sources.base import NoSource, Source
from shiwu.backfill.sources.lines import StandardInput
from shiwu.backfill.state import BackfillState, Change, Saved
from shiwu.backfill.summary import manifest_of, summary_of
from shiwu.backfill.targets import MANIFEST, SUMMARY, TEMPORARY, prepare
from shiwu.backfill.totals import Totals
from shiwu.broker.queue_stats import waiting_steps
from shiwu.broker.sharding import shard_of
from shiwu.broker.steps import OnShards, Steps, run
from shiwu.client.client import Client
from shiwu.client.sender import Sender, read_lane
from shiwu.client.stream_items import log
from shiwu.contract import Lane
from shiwu.parts import Objects, Target, open_target

CONTROL_EVERY_S: Final = 1.0
"""Seconds between two writes of the heartbeat, which bring the operator's wishes back."""
BLOCK_S: Final = 0.2
"""How long a turn waits for answers where it has nothing to send."""
RATE_OVER_S: Final = 60.0
FAILURES_AFTER: Final = 1000
"""Fewer answers than this do not stop a backfill."""
LOST_AFTER_S: Final = 300.0
"""After this time without an answer, and with an empty lane, jobs without an answer are sent again."""
CANCEL_PORTION: Final = 500
COMMAND_TIMEOUT_S: Final = 5.0
LANE_LIMIT: Final = 100_000
"""How many messages the lane may hold, as for other clients; more where `max_waiting` is larger."""


class Phase(StrEnum):
    """How a run ended, and what the state says."""

    RUNNING = "running"
    """It was interrupted; a start goes on."""
    FINISHED = "finished"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    """Too many jobs failed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a backfill is, for display."""

    phase: str
    reason: str
    """Why nothing is sent now; empty while it sends, and when all is sent."""
    read: int
    left_out: int
    sent: int
    unanswered: int
    answered: int
    total: int | None
    """How many jobs there will be, where that is known."""
    rate: float
    """Answers a second over the last minute."""
    by_status: dict[str, int]
    by_code: dict[str, int]

    @property
    def left(self) -> int | None:
        """Answers that are missing to the end, where the total is known."""
        return None if self.total is None else max(0, self.total - self.answered)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the present rate."""
        return None if self.left is None or self.rate <= 0 else self.left / self.rate

    @property
    def backlog_s(self) -> float | None:
        """Seconds until what is sent is answered, at the present rate."""
        return None if self.rate <= 0 else self.unanswered / self.rate

    def fields(self) -> dict[str, Any]:
        """As JSON objects hold it."""
        names = ("phase", "reason", "read", "left_out", "sent", "unanswered", "answered", "total")
        times = {"rate": round(self.rate, 1), "eta_s": _rounded(self.eta_s), "backlog_s": _rounded(self.backlog_s)}
        shown = {name: getattr(self, name) for name in names} | times
        return shown | {"by_status": self.by_status, "by_code": self.by_code}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


class Rate:
    """Mean rate of a growing count over the last minute."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def update(self, count: int, *, now_s: float) -> float:
        """Add a point, and return the rate per second."""
        self._points.append((now_s, count))
        while now_s - self._points[0][0] > RATE_OVER_S:
            self._points.popleft()
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        return 0.0 if last_s == first_s else (last - first) / (last_s - first_s)


class Runner:
    """One run of one backfill.

    Args:
        client: cancels jobs, and reads the clock of Redis.
        connections: clients of all shards that repeat commands by themselves, and such that do not.
        on_progress: called about once a second.
        is_stopping: whether the process was asked to end.
        clock: the time of day, for the window.
    """

    def __init__(
        self,
        *,
        client: Client,
        connections: tuple[tuple[redis.Redis, ...], tuple[redis.Redis, ...]],
        name: str,
        pace: Pace,
        objects: Objects,
        open_the_source: Callable[[Saved], Source],
        on_progress: Callable[[Progress], None],
        is_stopping: Callable[[], bool],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._shards, self._no_retry = connections
        self._pace = pace
        self._objects = objects
        self._open_the_source = open_the_source
        self._on_progress = on_progress
        self._is_stopping = is_stopping
        self._clock = clock
        self._state = BackfillState(self._shards[0], name, is_stopping=is_stopping)
        self._open = OpenJobs()
        self._recent = RecentJobs()
        self._token = secrets.token_hex(4)
        self._window: Window | None = read_window(pace.window) if pace.window else None
        self._wanted = ""
        self._controlled_s = 0.0
        self._rate = Rate()
        self._rate_now = 0.0
        self._is_over = False
        """Whether nothing more is sent, because of a cancel or of failures."""
        self._phase = Phase.RUNNING
        self._resent_s = 0.0
        self._ran_before = Totals()
        self._source: Source = NoSource()
        self._target: Target | None = None
        self._feeder: Feeder
        self._collector: Collector

    def run(self) -> Phase:
        """Run to the end, or until the process is asked to stop; return how it ended.

        Raises:
            BackfillError: it cannot go on; after the cause is gone, a start goes on where it was.
            redis.RedisError: Redis refuses a command, or was unavailable when the process stopped.
        """
        while True:
            try:
                return self._run_once()
            except StateLost as error:
                # What this process knows is newer than what Redis knows, as after a crash of the process it is older.
                log.warning("%s; beginning again with what is left", error)
                self._open, self._is_over, self._phase = OpenJobs(), False, Phase.RUNNING

    def _run_once(self) -> Phase:
        with ExitStack() as stack:
            saved = self._begin()
            self._resume(saved, stack)
            while not self._is_stopping():
                if self._turn():
                    return self._end()
            self._collector.record()
            self._control(is_last=True)
            self._state.leave()
        return Phase.RUNNING

    def _now_ms(self) -> float:
        return self._state.when_available(self._client.server_time_ms)

    # -------------------------------------------------------------------------------- begin
    def _begin(self) -> Saved:
        name, call = self._state.name, self._state.when_available
        if call(self._state.read) is None:
            raise UnusableState(
                f"{name}: Redis has lost the state of this backfill; start it again, with another --out"
            )
        now_ms = self._now_ms()
        call(lambda: self._state.take(self._token, now_ms=now_ms))
        saved = call(self._state.read)
        if saved is None or saved.phase in {Phase.FINISHED, Phase.CANCELLED}:
            raise TakenOver(f"{name}: another process has ended this backfill; this one ends")
        if isinstance(self._source, StandardInput) and not saved.is_source_done:
            text = "Redis has lost the place in standard input, which cannot be read twice"
            raise UnusableState(f"{name}: {text}; start it under another name with the same list")
        self._source = self._open_the_source(saved)
        return saved

    def _resume(self, saved: Saved, stack: ExitStack) -> None:
        stack.callback(self._source.close)
        if saved.plan.out:
            self._target = open_target(saved.plan.out, objects=self._objects, temporary=TEMPORARY)
            stack.callback(self._target.close)
            prepare(self._target, list(saved.parts.values()))
        self._recent.set_back(saved.portion)
        self._ran_before = saved.totals
        self._wanted = saved.wanted
        self._collector = Collector(
            clients=self._no_retry,
            acks=self._shards,
            state=self._state,
            saved=saved,
            open_jobs=self._open,
            target=self._target,
            part_rows=self._pace.part_rows,
            token=self._token,
        )
        stack.callback(self._collector.close)
        lane_limit = max(LANE_LIMIT, self._pace.max_waiting + LANE_LIMIT // 2)
        sender = Sender(max_waiting=lane_limit, timeout_s=COMMAND_TIMEOUT_S, shards=len(self._shards))
        self._feeder = Feeder(
            clients=self._shards,
            sender=sender,
            state=self._state,
            saved=saved,
            maker=JobMaker(self._state.name, saved.plan.fields),
            source=self._source,
            open_jobs=self._open,
            recent=self._recent,
            pace=self._pace,
            is_answered_skipped=self._pace.is_missing_only or not self._source.is_unique or saved.passes > 1,
            on_refused=lambda job: self._collector.refuse(job, now_ms=self._now_ms()),
        )
        self._collector.make_group()
        kept = self._state.when_available(lambda: dict(self._state.open_jobs()))
        self._open.open((job_id, one.record.image) for job_id, one in kept.items())
        for job in refused_jobs(list(kept.items())):
            self._collector.refuse(job, now_ms=self._now_ms())
        self._feeder.send_again(_unsent(kept, saved.sent_portion))

    # -------------------------------------------------------------------------------- one turn
    def _turn(self) -> bool:
        """Send and collect once; return whether all is done."""
        now_s = time.monotonic()
        if now_s - self._controlled_s >= CONTROL_EVERY_S:
            self._control()
        # A cancel has answered all that is registered; after too many failures that is still sent.
        has_sent = False
        if self._phase is not Phase.CANCELLED and not self._reason():
            has_sent = self._feeder.step(is_reading=not self._is_over)
        has_read = self._collector.step(block_s=0.0 if has_sent else BLOCK_S)
        if not has_read and not has_sent:
            self._send_lost()
        return not self._open.unanswered and (self._is_over or self._feeder.is_done)

    def _reason(self) -> str:
        """Why nothing may be sent now; empty if something may."""
        if self._wanted == "pause":
            return "paused"
        if self._window is not None and not self._window.is_open(self._clock()):
            return f"waiting for {self._window.opens}"
        return ""

    def _control(self, *, is_last: bool = False) -> None:
        """Write the heartbeat, read what the operator wants, look at the failures, and show the progress."""
        self._controlled_s = time.monotonic()
        seen = self._collector.seen
        self._rate_now = self._rate.update(seen.answered, now_s=self._controlled_s)
        shown = self._progress(seen)
        live = msgspec.json.encode(shown.fields()).decode()
        change = Change({"live": live, "heartbeat_ms": repr(self._now_ms())})
        self._wanted = self._state.write(change)
        self._on_progress(shown)
        if is_last or self._is_over:
            return
        if self._wanted == "cancel":
            self._is_over, self._phase = True, Phase.CANCELLED
            self._cancel_waiting()
        elif self._has_too_many_failures(seen):
            self._is_over, self._phase = True, Phase.STOPPED

    def _has_too_many_failures(self, seen: Totals) -> bool:
        """By what this run has collected: a start after the cause is gone must not stop at old failures."""
        answered = seen.answered - self._ran_before.answered
        failed = seen.failed - self._ran_before.failed
        limit = self._pace.stop_at_failures
        return limit is not None and answered >= FAILURES_AFTER and failed >= limit * answered

    def _cancel_waiting(self) -> None:
        ids = list(self._open.without_answer())
        for first in range(0, len(ids), CANCEL_PORTION):
            portion = ids[first : first + CANCEL_PORTION]
            self._state.when_available(partial(self._client.cancel, portion, reason="the backfill was cancelled"))

    def _send_lost(self) -> None:
        """Send jobs again that got no answer for long though their lane is empty, as after a loss of data in Redis."""
        now_s = time.monotonic()
        if self._phase is Phase.CANCELLED or now_s - max(self._collector.answered_s, self._resent_s) < LOST_AFTER_S:
            return
        self._resent_s = now_s
        if empty := self._shards_with_empty_lane():
            count = len(self._shards)
            missing = [job_id for job_id in self._collector.look_up() if shard_of(job_id, shards=count) in empty]
            missing = self._collector.give_up_lost(missing, now_ms=self._now_ms())
            lost = self._state.when_available(lambda: list(self._state.records(missing)))
            self._feeder.send_again(lost, is_lost=True)

    def _shards_with_empty_lane(self) -> set[int]:
        lane = read_lane(self._pace.lane)
        outcomes = run(self._shards, _waiting_steps(lane, shards=len(self._shards)))
        return {shard for shard, found in outcomes.items() if not isinstance(found, Exception) and not found[lane]}

    def _progress(self, seen: Totals) -> Progress:
        feeder = self._feeder
        # What filters leave out so far is taken for their share of the rest.
        total = feeder.read if feeder.is_source_done else self._source.total(read=feeder.read, cursor=feeder.cursor)
        if total is not None:
            kept = (feeder.read - feeder.left_out) / feeder.read if feeder.read else 1.0
            answered_or_open = seen.answered + self._open.unanswered
            total = answered_or_open + round(max(0, total - feeder.read) * kept)
        reason = "" if self._is_over or feeder.is_done else self._reason() or feeder.trouble
        return Progress(
            phase=str(self._phase),
            reason=reason,
            read=feeder.read,
            left_out=feeder.left_out,
            sent=feeder.sent,
            unanswered=self._open.unanswered,
            answered=seen.answered,
            total=total,
            rate=self._rate_now,
            by_status=seen.by("status"),
            by_code=seen.by("code"),
        )

    # -------------------------------------------------------------------------------- end
    def _end(self) -> Phase:
        """Record the last part, write manifest and summary, and say in the state that it has ended."""
        self._collector.record()
        if not self._is_over:
            self._phase = Phase.FINISHED
        self._control(is_last=True)
        phase, ended_ms = str(self._phase), self._now_ms()
        saved = self._state.when_available(self._state.read)
        if self._target is not None and saved is not None:
            self._target.put(SUMMARY, summary_of(self._state.name, saved, phase=phase, ended_ms=ended_ms))
            self._target.put(MANIFEST, manifest_of(self._state.name, saved))
        self._collector.drop_group()
        self._state.write(Change({"phase": phase, "wanted": "", "ended_ms": repr(ended_ms), "owner": ""}))
        self._state.when_available(self._state.expire)
        return self._phase


def _waiting_steps(lane: Lane, *, shards: int) -> Steps[Mapping[int, dict[Lane, int] | Exception]]:
    """Messages in the lane of each shard, or why they could not be counted."""
    found: Mapping[int, dict[Lane, int] | Exception] = yield OnShards(
        {shard: waiting_steps([lane]) for shard in range(shards)}
    )
    return found


def _unsent(kept: dict[str, KeptRecord], sent_portion: int) -> list[tuple[str, KeptRecord]]:
    return [(job_id, one) for job_id, one in kept.items() if one.portion > sent_portion]
