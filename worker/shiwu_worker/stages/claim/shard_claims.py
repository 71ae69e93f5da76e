"""Claims from one shard on a thread of its own, so that a shard that does not answer holds up no other.

`LaneWatch` says when a shard without messages has some again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from redis import RedisError

from shiwu.contract import Lane
from shiwu_worker.jobs.job import Release
from shiwu_worker.runtime.threads import ServiceThread

if TYPE_CHECKING:
    from shiwu_worker.errors import FatalError
    from shiwu_worker.runtime.backoff import RedisBackoff
    from shiwu_worker.stages.claim.lease_queue import ClaimResult, LeaseQueue

IDLE_WAIT_S: Final = 5.0
"""Longest wait of a thread for something to do."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be claimed from one shard."""

    limit: int
    bulk_limit: int
    held: Collection[str]
    is_alone: bool
    """Whether nothing is in flight and no other shard is asked, so that a quarantined job may run."""


class ShardClaims:
    """One shard, as the thread that asks it sees it.

    Fields and methods without a note are used under the lock of `changed`.

    Args:
        changed: notified when an ask is answered, and when messages may wait.
        backoff: the pauses while the shard does not answer.
        on_fatal: called when the thread ends by a defect.
        on_dry: called after a claim, where a lane has no messages.
    """

    def __init__(
        self,
        index: int,
        lease_queue: LeaseQueue,
        *,
        changed: threading.Condition,
        backoff: RedisBackoff,
        on_fatal: Callable[[FatalError], None],
        on_dry: Callable[[], None] = lambda: None,
    ) -> None:
        self.index = index
        self.lease_queue = lease_queue
        """Thread-safe; needs no lock."""
        self.may_have_interactive = self.may_have_bulk = True
        """Whether a lane may have messages; False after a claim found none, until the lane is seen to have some."""
        self.is_notified = False
        """Whether there were signs of messages since the last ask; such a shard is asked first."""
        self.error: RedisError | None = None
        """Why the last command failed; the shard is not asked until another succeeds."""
        self.asked: Ask | None = None
        self.asked_s = 0.0
        """When it was asked, on the monotonic clock."""
        self.result: ClaimResult | None = None
        """The reply to the last ask, until it is taken."""
        self.turn = 0
        """Number of the last ask among those to all shards."""
        self._changed = changed
        self._backoff = backoff
        self._held: Collection[str] = ()
        self._surplus: list[Release] = []
        self._on_dry = on_dry
        self._woken = threading.Event()
        self._closed = threading.Event()
        self.thread = ServiceThread(f"claim-{index}", self._run, on_fatal=on_fatal, stop=self.close)

    # -------------------------------------------------------------------------------- under the lock
    @property
    def is_free(self) -> bool:
        """Whether the shard can be asked now."""
        return self.error is None and self.asked is None and self.result is None

    def may_have(self, *, is_bulk_wanted: bool) -> bool:
        """Whether messages may wait that there is room for."""
        return self.may_have_interactive or (is_bulk_wanted and self.may_have_bulk)

    def ask(self, ask: Ask) -> None:
        """Let the thread claim."""
        self.asked, self._held, self.is_notified = ask, ask.held, False
        self.asked_s = time.monotonic()
        self._woken.set()

    def note_messages(self) -> None:
        """Note that messages may wait."""
        self.may_have_interactive = self.may_have_bulk = self.is_notified = True
        self._changed.notify_all()

    def give_back(self, releases: Sequence[Release]) -> None:
        """Let the thread release claimed jobs that there is no room for."""
        self._surplus += releases
        self._woken.set()

    # -------------------------------------------------------------------------------- from any thread
    def dry_lanes(self) -> list[Lane]:
        """The lanes that have no messages; none while the shard is asked, or does not answer."""
        with self._changed:
            if self.error is not None or self.asked is not None:
                return []
            lanes = ((Lane.INTERACTIVE, self.may_have_interactive), (Lane.BULK, self.may_have_bulk))
            return [lane for lane, may_have in lanes if not may_have]

    def note_messages_in(self, lanes: Collection[Lane]) -> None:
        """Note that these lanes may have messages."""
        if not lanes:
            return
        with self._changed:
            self.may_have_interactive |= Lane.INTERACTIVE in lanes
            self.may_have_bulk |= Lane.BULK in lanes
            self.is_notified = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let the thread end. A claim that is under way is given up by `LeaseQueue.end`."""
        self._closed.set()
        self._woken.set()

    # -------------------------------------------------------------------------------- on the thread
    def _run(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                ask, error = self.asked, self.error
                surplus, self._surplus = self._surplus, []
            if error is not None:
                self._try_again(error, surplus)
            elif surplus:
                self._release(surplus)
            elif ask is not None:
                self._claim(ask)
            else:
                self._woken.wait(IDLE_WAIT_S)
                self._woken.clear()

    def _claim(self, ask: Ask) -> None:
        try:
            result = self.lease_queue.claim(ask.limit, bulk_limit=ask.bulk_limit, held=ask.held, is_idle=ask.is_alone)
        except RedisError as error:
            self._fail(error)
            return
        with self._changed:
            self.asked, self.result = None, result
            if not result.jobs and not result.is_quarantine_owner:
                self.may_have_interactive = False
                self.may_have_bulk = self.may_have_bulk and ask.bulk_limit == 0
            self._changed.notify_all()
        if self.dry_lanes():
            # Also where the other lane has jobs: a notification may have come while the shard was asked.
            self._on_dry()

    def _release(self, surplus: Sequence[Release]) -> None:
        try:
            self.lease_queue.release(surplus)
        except RedisError as error:
            self._fail(error, surplus)

    def _fail(self, error: RedisError, surplus: Sequence[Release] = ()) -> None:
        with self._changed:
            self.asked, self.error = None, error
            # Kept, because a lease that expires counts as a worker death of its job.
            self._surplus = [*surplus, *self._surplus]
            self._changed.notify_all()

    def _try_again(self, error: RedisError, surplus: Sequence[Release]) -> None:
        """Pause, release the surplus, and give up a claim whose reply was lost; then the shard may be asked again."""
        self._backoff.wait(error, self._closed)
        if self._closed.is_set():
            return
        try:
            self.lease_queue.release(surplus)
            if self.lease_queue.has_lost_reply:
                self.lease_queue.release_lost(self._held)
        except RedisError as again:
            self._fail(again, surplus)
            return
        self._backoff.reset()
        with self._changed:
            self.error = None
            self.note_messages()
