"""Reads messages of a source in portions, and makes jobs of them, until it is stopped or the source is empty."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import redis

from shiwu.broker.backoff import Backoff
from shiwu.broker.redis_errors import NotReplicated, explain, info_of
from shiwu.errors import QueueFull
from shiwu.watch.intake import Intake, Plan
from shiwu.watch.sources.base import Source, SourceUnavailable, Taken

WAIT_S: Final = 2.0
"""How long one look at the source waits for a message."""
UNCONFIRMED_PAUSE_S: Final = 10.0
"""The pause where replicas did not confirm jobs: each further try puts them into their lane again."""


class Reports(Protocol):
    """Where a watcher says what it does. Thread-safe."""

    def portion(self, *, messages: int, plan: Plan, duration_s: float) -> None:
        """The jobs of a portion are enqueued."""

    def source(self, problem: str = "") -> None:
        """The source answers, or does not because of this problem."""

    def lanes(self, problem: str = "") -> None:
        """The lanes take jobs, or do not because of this problem."""


class Stopped(Exception):
    """The watcher was stopped while the jobs of a portion had to wait; the portion is given back."""


class Watcher:
    """Moves messages of one source into the lanes. `run` is called once, by one thread.

    Args:
        portion: messages that are taken together.
        stop: ends `run` after the portion under way, or within two seconds where that has to wait.
    """

    def __init__(
        self, source: Source[Any], intake: Intake, reports: Reports, *, portion: int, stop: threading.Event
    ) -> None:
        self._source = source
        self._intake = intake
        self._reports = reports
        self._portion = portion
        self._stop = stop

    def run(self, *, is_once: bool) -> None:
        """Take portions until `stop` is set, or with `is_once` until the source is empty.

        Raises:
            SourceWrong, redis.RedisError: an error that time does not cure; what was taken comes again later.
        """
        backoff = Backoff()
        # A wait would ask an empty source again, so one that is to be drained is not waited for.
        wait_s = 0.0 if is_once else WAIT_S
        while not self._stop.is_set():
            try:
                taken = self._source.take(self._portion, wait_s=wait_s)
                self._reports.source()
                if taken:
                    self._deliver(taken)
                elif is_once:
                    return
                backoff.reset()
            except SourceUnavailable as error:
                self._reports.source(str(error))
                self._stop.wait(backoff.next_s())
            except Stopped:
                return

    def _deliver(self, taken: Sequence[Taken[Any]]) -> None:
        began_s = time.monotonic()
        plan = self._intake.plan(message for _, message in taken)
        try:
            self._carry_out(plan, taken)
        except Stopped:
            self._source.give_back(taken)
            raise
        try:
            self._source.done(taken)
        finally:
            # The jobs are enqueued in any case; messages that stay at the source are counted as duplicates later.
            self._reports.portion(messages=len(taken), plan=plan, duration_s=time.monotonic() - began_s)

    def _carry_out(self, plan: Plan, taken: Sequence[Taken[Any]]) -> None:
        backoff = Backoff()
        while True:
            try:
                self._intake.carry_out(plan)
            except (QueueFull, redis.RedisError) as error:
                if isinstance(error, redis.RedisError) and not info_of(error).is_temporary:
                    raise
                self._reports.lanes(wait_reason(error))
                pause_s = UNCONFIRMED_PAUSE_S if isinstance(error, NotReplicated) else backoff.next_s()
            else:
                self._reports.lanes()
                return
            if self._stop.wait(pause_s):
                raise Stopped
            self._keep(taken)

    def _keep(self, taken: Sequence[Taken[Any]]) -> None:
        """Keep messages from other watchers. If that fails, their jobs are enqueued all the same: ids fold copies."""
        try:
            self._source.keep(taken)
            self._reports.source()
        except SourceUnavailable as error:
            self._reports.source(str(error))


def wait_reason(error: QueueFull | redis.RedisError) -> str:
    """Why jobs have to wait, for a log."""
    return str(error) if isinstance(error, QueueFull) else explain(error)
