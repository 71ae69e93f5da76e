"""Claims from all shards: what the claim loop uses in place of one lease queue and one lane notifier."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from redis import RedisError

from shiwu.broker.redis_errors import info_of
from shiwu.contract import Lane
from shiwu_worker.jobs.job import Claimed, Release
from shiwu_worker.stages.claim.lease_queue import ClaimResult
from shiwu_worker.stages.claim.shard_claims import Ask, ShardClaims

SHARDS_PER_ROUND: Final = 2
ROUND_TIMEOUT_S: Final = 0.1
"""How long a round waits for its shards. A reply that comes later is passed on by a later round."""
LATE_S: Final = 0.5
"""For so long the room that a shard was asked to fill is kept for its reply."""
_BULK: Final = frozenset(Lane.BULK.keys)


class ShardedClaims:
    """Asks two shards in each round, half of the room each, and the next two in the next round.

    A shard that gave nothing is not asked until its lanes are seen to have messages. Shards with new messages come
    first. While this worker owns the quarantine of a shard, every other round is for that shard alone.

    `claim` and `wait` belong to one thread; the other methods may be called from any.

    Args:
        shards: their `changed` is that of this object.
        is_away: whether other threads get no reply from a shard.
        runs_nothing: whether no job is in flight.
        close_timeout_s: how long `release` and `end` wait for all shards together.
        on_close: called by `close`; must not block.
    """

    has_lost_reply: Final = False
    """A claim whose reply was lost is given up on the thread of its shard."""

    def __init__(
        self,
        shards: Sequence[ShardClaims],
        *,
        changed: threading.Condition,
        is_away: Callable[[int], bool],
        runs_nothing: Callable[[], bool],
        close_timeout_s: float,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._shards = shards
        self._changed = changed
        self._is_away = is_away
        self._runs_nothing = runs_nothing
        self._close_timeout_s = close_timeout_s
        self._on_close = on_close
        self._owned: set[int] = set()
        """Shards whose quarantined jobs this worker runs."""
        self._is_owned_turn = True
        self._turns = 0
        self._is_notified = self._is_closed = False

    # -------------------------------------------------------------------------------- claims
    def claim(self, limit: int, *, bulk_limit: int | None = None, held: Collection[str] = ()) -> ClaimResult:
        """Claim up to `limit` jobs; see `LeaseQueue.claim`.

        Raises:
            redis.RedisError: no shard answers.
        """
        bulk_limit = limit if bulk_limit is None else bulk_limit
        tried: set[int] = set()
        with self._changed:
            # The quarantine of a shard that is away gets another owner.
            self._owned = {index for index in self._owned if self._answers(self._shards[index])}
            jobs = self._take_late(limit, bulk_limit)
            while not jobs:
                room, bulk_room = self._without_asked(limit, bulk_limit)
                shards = self._choose(room, bulk_room, tried) if room > 0 else []
                if not shards:
                    if room < limit:
                        self._wait_for_late()
                        jobs = self._take_late(limit, bulk_limit)
                    break
                tried.update(shard.index for shard in shards)
                jobs = self._ask(shards, room, bulk_room, held)
            if not jobs and all(shard.error is not None for shard in self._shards):
                raise self._worst_error()
            return ClaimResult(tuple(jobs), is_quarantine_owner=bool(self._owned))

    def release_lost(self, held: Collection[str]) -> int:
        """Have no effect: each shard does it itself."""
        del held
        return 0

    def end(self, held: Collection[str] = ()) -> int:
        """Claim nothing from now on, and release what the last claims brought and is not among `held`."""
        return self._on_each([partial(shard.lease_queue.end, held) for shard in self._shards])

    def release(self, releases: Sequence[Release]) -> int:
        """Release jobs to the shards that they came from; returns how many this worker still held."""
        queues = {shard.index: shard.lease_queue for shard in self._shards}
        by_shard: dict[int, list[Release]] = {}
        for each in releases:
            by_shard.setdefault(each.shard, []).append(each)
        return self._on_each([partial(queues[index].release, portion) for index, portion in by_shard.items()])

    # -------------------------------------------------------------------------------- messages
    def wait(self, timeout_s: float, *, lanes: Collection[Lane] = tuple(Lane)) -> bool:
        """Block until a shard may have messages in these lanes (True), or until the time-out or `close` (False)."""

        def is_over() -> bool:
            return self._is_closed or self._is_notified or self._may_claim(is_bulk_wanted=Lane.BULK in lanes)

        with self._changed:
            found = self._changed.wait_for(is_over, timeout_s)
            self._is_notified = False
            return found and not self._is_closed

    def notify(self) -> None:
        """Wake the thread in `wait`."""
        with self._changed:
            self._is_notified = True
            self._changed.notify_all()

    def note_messages(self, shard: int) -> None:
        """Ask this shard next, because there is work that no lane shows."""
        with self._changed:
            self._shards[shard].note_messages()

    def reconnect(self) -> None:
        """Have no effect: each shard does it itself."""

    def close(self) -> None:
        """Wake the thread in `wait`, and let the threads of the shards end."""
        self._is_closed = True
        for shard in self._shards:
            shard.close()
        self._on_close()
        self.notify()

    # -------------------------------------------------------------------------------- under the lock
    def _answers(self, shard: ShardClaims) -> bool:
        return shard.error is None and not self._is_away(shard.index)

    def _may_claim(self, *, is_bulk_wanted: bool) -> bool:
        return any(
            shard.result is not None
            or (shard.is_free and self._answers(shard) and shard.may_have(is_bulk_wanted=is_bulk_wanted))
            for shard in self._shards
        )

    def _choose(self, limit: int, bulk_limit: int, tried: set[int]) -> list[ShardClaims]:
        """The shards to ask now, at most two, which have not been asked in this call."""
        may_have = [
            shard
            for shard in self._shards
            if shard.is_free
            and shard.index not in tried
            and self._answers(shard)
            and (shard.may_have(is_bulk_wanted=bulk_limit > 0) or shard.index in self._owned)
        ]
        may_have.sort(key=lambda shard: (not shard.is_notified, shard.turn))
        owned = [shard for shard in may_have if shard.index in self._owned]
        others = [shard for shard in may_have if shard.index not in self._owned]
        if owned and self._may_run_alone() and (self._is_owned_turn or not others):
            return owned[:1]
        # A share of bulk that is rounded to nothing would make a lane look empty.
        return others[: min(SHARDS_PER_ROUND, limit, bulk_limit or SHARDS_PER_ROUND)]

    def _without_asked(self, limit: int, bulk_limit: int) -> tuple[int, int]:
        """The room without what slow shards have been asked for, so that their jobs will not have to go back.

        A shard that has not answered for LATE_S may hang, and keeps no room from the others any more.
        """
        now_s = time.monotonic()
        asks = [
            shard.asked
            for shard in self._shards
            if shard.asked is not None and now_s - shard.asked_s < LATE_S and self._answers(shard)
        ]
        room = limit - sum(ask.limit for ask in asks)
        return room, max(0, min(room, bulk_limit - sum(ask.bulk_limit for ask in asks)))

    def _wait_for_late(self) -> None:
        self._changed.wait_for(
            lambda: self._is_closed or any(shard.result is not None for shard in self._shards), ROUND_TIMEOUT_S
        )

    def _may_run_alone(self) -> bool:
        return self._runs_nothing() and all(shard.asked is None and shard.result is None for shard in self._shards)

    def _ask(self, shards: Sequence[ShardClaims], limit: int, bulk_limit: int, held: Collection[str]) -> list[Claimed]:
        """Ask these shards, and wait for their replies for ROUND_TIMEOUT_S."""
        is_alone = shards[0].index in self._owned
        if self._owned:
            self._is_owned_turn = not is_alone
        for place, shard in enumerate(shards):
            self._turns += 1
            shard.turn = self._turns
            shard.ask(
                Ask(
                    limit=_share(limit, place, len(shards)),
                    bulk_limit=_share(bulk_limit, place, len(shards)),
                    held=held,
                    is_alone=is_alone,
                )
            )
        self._changed.wait_for(lambda: self._is_closed or all(shard.asked is None for shard in shards), ROUND_TIMEOUT_S)
        return [job for shard in shards for job in self._take(shard)]

    def _take(self, shard: ShardClaims) -> Sequence[Claimed]:
        """The jobs of the reply to the last ask."""
        result, shard.result = shard.result, None
        if result is None:
            self._owned.discard(shard.index)
            return ()
        if result.is_quarantine_owner:
            self._owned.add(shard.index)
        else:
            self._owned.discard(shard.index)
        return result.jobs

    def _take_late(self, limit: int, bulk_limit: int) -> list[Claimed]:
        """Jobs of replies that came too late for their round, as many as there is room for; the others go back."""
        jobs: list[Claimed] = []
        for shard in self._shards:
            if shard.result is None:
                continue
            surplus: list[Claimed] = []
            for job in self._take(shard):
                is_bulk = job.key in _BULK
                # A quarantined job, which its reply alone brings, must run alone.
                may_run = shard.index not in self._owned or (self._runs_nothing() and not jobs)
                if may_run and limit > 0 and (bulk_limit > 0 or not is_bulk):
                    jobs.append(job)
                    limit -= 1
                    bulk_limit -= is_bulk
                else:
                    surplus.append(job)
            if surplus:
                shard.give_back([Release(job.id, shard=job.shard) for job in reversed(surplus)])
            if jobs and shard.index in self._owned:
                break
        return jobs

    def _worst_error(self) -> RedisError:
        """The error that only the operator can remove, if there is one."""
        errors = [shard.error for shard in self._shards if shard.error is not None]
        return next((error for error in errors if info_of(error).ends_start), errors[0])

    # -------------------------------------------------------------------------------- while the worker stops
    def _on_each(self, calls: Sequence[Callable[[], int]]) -> int:
        """Make these calls at the same time; the sum of what they return, and the first error if one failed."""
        replies: list[int] = []
        errors: list[RedisError] = []

        def run(call: Callable[[], int]) -> None:
            try:
                replies.append(call())
            except RedisError as error:
                errors.append(error)

        until_s = time.monotonic() + self._close_timeout_s
        threads = [threading.Thread(target=run, args=(call,), name="claim-end", daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        if errors:
            raise errors[0]
        return sum(replies)


def _share(of: int, place: int, places: int) -> int:
    return of // places + (place < of % places)
