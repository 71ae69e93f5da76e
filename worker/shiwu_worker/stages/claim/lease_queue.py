"""Redis lanes → jobs under lease.

Every change of hands is one server-side script, so that a message is always in its lane, among the delayed, or claimed
under a lease; it is never in no one's hands. Only the server's clock judges leases and delays.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.answers import answered_before
from shiwu.broker.maintenance import HISTORY_TTL_S, QUARANTINE_AFTER_DEATHS
from shiwu.broker.retention import RESULT_TTL_S
from shiwu.broker.script_loader import load_script
from shiwu.contract import (
    ATTEMPTS,
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DELAYED,
    DELAYED_MESSAGES,
    HISTORY,
    LAST_CLAIM,
    LEASES,
    PENDING_CALLBACK_ANSWER,
    QUARANTINE,
    QUARANTINE_OWNER,
    REVOKED,
    Lane,
    done_key,
    result_key,
)
from shiwu_worker.jobs.job import Claimed, Release

MAX_CLAIM: Final = 1000
"""Lua's stack holds about 8,000 values, and a claim unpacks two for each job."""
_PACKAGE: Final = "shiwu_worker.stages.claim"
_LANE_KEYS: Final = (*Lane.INTERACTIVE.keys, *Lane.BULK.keys)
_BULK: Final = frozenset(Lane.BULK.keys)


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """What one claim brought."""

    jobs: tuple[Claimed, ...]
    alone: bool = False
    """Suspects wait and are ours to take: one at a time, while we hold nothing else."""


class LeaseQueue:
    """The claims of one worker. Thread-safe; every method is one round trip and raises redis.RedisError.

    Args:
        client: a client with socket time-outs and without `decode_responses`.
        token: unique to this worker's life; only who holds a job's token may renew or release it.
        bulk_share: share of the places that bulk gets although interactive jobs wait, 0 to 1.
        lanes: the lanes that are served; jobs that are tried alone are taken from all.
        worker: name of the worker, for answers to copies of jobs whose answer is gone.
        result_ttl_s: how long such an answer is kept.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        token: str,
        lease_s: float,
        bulk_share: float,
        lanes: Collection[Lane] = tuple(Lane),
        worker: str = "",
        result_ttl_s: int = RESULT_TTL_S,
    ) -> None:
        self._token = token
        self._served = [int(lane in lanes) for lane in (Lane.INTERACTIVE, Lane.BULK)]
        self._worker = worker
        self._result_ttl_s = result_ttl_s
        self._lease_ms = int(lease_s * 1000)
        self._bulk_share = bulk_share
        self._bulk_owed = 0.0
        self._is_suspects_turn = True
        self._is_reply_lost = False
        self._ahead_ms: float | None = None
        self._client = client
        self._last_claim = f"{LAST_CLAIM}{token}"
        self._claim = load_script(client, "claim", package=_PACKAGE)
        self._renew = load_script(client, "renew", package=_PACKAGE)
        self._release = load_script(client, "release", package=_PACKAGE)

    def claim(self, limit: int, *, held: Collection[str] = ()) -> ClaimResult:
        """Take up to `limit` jobs, interactive first. Copies of answered or claimed jobs are dropped on the way.

        The kept answer of a copy is announced again; where none is kept, the copy is answered `already_answered`.

        Args:
            held: ids that this worker holds. What a claim took whose reply was lost is none of them, and goes back.
        """
        if self._is_reply_lost:
            self._release_lost_reply(held)
        holds_nothing = not held
        limit = min(limit, MAX_CLAIM)
        # A debt from times without bulk must not later shut interactive jobs out: two claims' worth at most.
        fair = limit * self._bulk_share
        bulk_owed = min(self._bulk_owed + fair, max(2.0, 2 * fair))
        keys = [CLAIMS, LEASES, ATTEMPTS, COUNTERS, QUARANTINE, QUARANTINE_OWNER, REVOKED, self._last_claim]
        keys += [CANVAS, CANVAS_DUE, *_LANE_KEYS]
        args: list[Any] = [self._token, limit, int(bulk_owed), self._lease_ms, done_key(""), int(holds_nothing)]
        self._is_reply_lost = True
        args += [int(self._is_suspects_turn), PENDING_CALLBACK_ANSWER, result_key(""), self._result_ttl_s]
        args += [answered_before(self._worker, now_ms=self._server_time_ms()), HISTORY, *self._served]
        reply: list[Any] = self._claim(keys=keys, args=args)
        self._is_reply_lost = False
        claimed_s = time.monotonic()
        claimed_ms = float(reply[0])
        self._ahead_ms = claimed_ms - claimed_s * 1000
        jobs = tuple(
            Claimed(
                id=reply[i].decode(),
                attempt=reply[i + 1],
                deaths=reply[i + 2],
                key=_LANE_KEYS[reply[i + 3] - 1],
                raw=reply[i + 4],
                claimed_ms=claimed_ms,
                claimed_s=claimed_s,
                is_revoked=reply[i + 5] == 1,
                history=reply[i + 6],
            )
            for i in range(2, len(reply), 7)
        )
        if is_alone := bool(reply[1]):
            self._is_suspects_turn = self._is_suspects_turn != holds_nothing
        if jobs:
            self._bulk_owed = max(0.0, bulk_owed - sum(job.key in _BULK for job in jobs))
        return ClaimResult(jobs, alone=is_alone)

    def _server_time_ms(self) -> float:
        """The server's clock as the last claim showed it, or this machine's before the first."""
        return time.time() * 1000 if self._ahead_ms is None else time.monotonic() * 1000 + self._ahead_ms

    def _release_lost_reply(self, held: Collection[str]) -> None:
        """Without this they would wait until a lease ends that nobody renews, and count as jobs of a dead worker."""
        last: Any = self._client.get(self._last_claim)
        ids = msgspec.json.decode(last, type=list[str]) if last else []
        self.release([Release(job_id) for job_id in reversed(ids) if job_id not in held])

    def renew(self, ids: Sequence[str]) -> list[str]:
        """Prolong the leases; return the ids that are no longer ours."""
        if not ids:
            return []
        lost: list[bytes] = self._renew(keys=[CLAIMS, LEASES], args=[self._token, self._lease_ms, *ids])
        return [job_id.decode() for job_id in lost]

    def release(self, releases: Sequence[Release]) -> int:
        """Give jobs back; return how many were still ours. The last one given comes first in its lane."""
        if not releases:
            return 0
        args: list[Any] = [self._token, QUARANTINE_AFTER_DEATHS, HISTORY, HISTORY_TTL_S]
        for item in releases:
            args += [item.id, int(item.delay_s * 1000), int(item.counts), item.ending]
        released: int = self._release(keys=[CLAIMS, LEASES, ATTEMPTS, DELAYED, DELAYED_MESSAGES, QUARANTINE], args=args)
        return released
