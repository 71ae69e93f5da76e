"""Claims jobs from the Redis lanes under a lease, renews the leases, and releases jobs.

Each of these is one server-side script, so a message is at any moment either in its lane, delayed, quarantined, or
claimed under a lease. Only the server's clock decides about leases and delays.
"""

from __future__ import annotations

import math
import secrets
import threading
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
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    HISTORIES,
    HISTORIES_EXPIRY,
    LAST_CLAIM,
    LEASES,
    MARKS,
    PENDING_ANSWERS,
    PENDING_ANSWERS_EXPIRY,
    QUARANTINE,
    QUARANTINE_OWNER,
    REVOKED,
    Lane,
    result_key,
)
from shiwu_worker.jobs.job import Claimed, Release
from shiwu_worker.policy.limits import LeaseOptions

MAX_CLAIM: Final = 1000
"""Most jobs of one claim: Lua's stack holds about 8,000 values, and a claim unpacks two for each job."""
_PACKAGE: Final = "shiwu_worker.stages.claim"
_LANE_KEYS: Final = (*Lane.INTERACTIVE.keys, *Lane.BULK.keys)
_BULK: Final = frozenset(Lane.BULK.keys)
LAST_CLAIM_KEPT_MS: Final = 600_000
"""How long the server remembers which claims were given up; no command is on its way for so long."""
_FIRST_JOB: Final = 3
_JOB_FIELDS: Final = 8
"""Positions in the reply of `claim.lua`: the first job, and fields per job."""


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """The jobs of one claim."""

    jobs: tuple[Claimed, ...]
    is_quarantine_owner: bool = False
    """Whether this worker runs the quarantined jobs: one at a time, while it holds nothing else."""


class LeaseQueue:
    """The claims of one worker. Thread-safe; each method raises redis.RedisError, and is one round trip; a claim that
    finds duplicates whose clients may wait for an answer is two.

    Args:
        client: a client with socket time-outs and without `decode_responses`.
        token: unique to this run of the worker; only claims with this token are renewed or released.
        worker: name of the worker, for answers to duplicates of jobs whose answer has expired.
        result_ttl_s: how long such an answer is kept.
        shard: index of the shard of the client; stands in every claimed message.
    """

    def __init__(
        self,
        client: redis.Redis,
        options: LeaseOptions,
        *,
        token: str,
        worker: str = "",
        result_ttl_s: int = RESULT_TTL_S,
        shard: int = 0,
    ) -> None:
        self._token = token
        self._shard = shard
        self._served_flags = [int(lane in options.lanes) for lane in (Lane.INTERACTIVE, Lane.BULK)]
        self._worker = worker
        self._result_ttl_s = result_ttl_s
        self._lease_ms = int(options.lease_s * 1000)
        self._bulk_share = options.bulk_share
        self._bulk_owed = 0.0
        self._is_quarantine_turn = True
        self._may_have_lost_reply = False
        self._lock = threading.Lock()
        self._claim_number = 0
        self._has_ended = False
        self._client = client
        self._last_claim_key = f"{LAST_CLAIM}{token}.{secrets.token_hex(4)}"  # the numbers of claims begin at 1
        self._claim = load_script(client, "claim", package=_PACKAGE)
        self._renew = load_script(client, "renew", package=_PACKAGE)
        self._release = load_script(client, "release", package=_PACKAGE)
        self._end_claims = load_script(client, "end_claims", package=_PACKAGE)
        self._answer_duplicates = load_script(client, "answer_duplicates", package=_PACKAGE)

    def claim(
        self,
        limit: int,
        *,
        bulk_limit: int | None = None,
        held: Collection[str] = (),
        is_idle: bool | None = None,
    ) -> ClaimResult:
        """Claim up to `limit` jobs, interactive first; drops duplicates of answered or claimed jobs.

        After `end` it claims nothing.

        The stored answer of a duplicate is announced again; if it has expired, the answer is `already_answered`.

        Args:
            bulk_limit: how many of them may come from bulk; None for all.
            held: ids that this worker holds. Jobs of a claim whose reply was lost are not among them and are released.
            is_idle: whether a quarantined job would run alone; None: if `held` is empty.
        """
        if self._may_have_lost_reply:
            self.release_lost(held)
        with self._lock:
            if self._has_ended:
                return ClaimResult(())
            self._claim_number += 1
            self._may_have_lost_reply = True
        holds_nothing = not held if is_idle is None else is_idle
        limit = min(limit, MAX_CLAIM)
        # At most two shares add up while no bulk jobs wait, so that these cannot keep interactive jobs out later.
        bulk_share = limit * self._bulk_share
        bulk_owed = min(self._bulk_owed + bulk_share, max(2.0, 2 * bulk_share))
        keys = [CLAIMS, LEASES, ATTEMPTS, COUNTERS, QUARANTINE, QUARANTINE_OWNER, REVOKED, self._last_claim_key]
        keys += [CANVAS, CANVAS_DUE, DEADLINES, PENDING_ANSWERS, PENDING_ANSWERS_EXPIRY, HISTORIES, *MARKS, *_LANE_KEYS]
        args: list[Any] = [self._token, limit, int(bulk_owed), self._lease_ms, int(holds_nothing)]
        args += [int(self._is_quarantine_turn), *self._served_flags]
        args += [limit if bulk_limit is None else min(limit, bulk_limit), QUARANTINE_AFTER_DEATHS, self._claim_number]
        reply: list[Any] = self._claim(keys=keys, args=[*args, *_LANE_KEYS])
        claimed_s = time.monotonic()
        claimed_ms = float(reply[0])
        self._announce([job_id.decode() for job_id in reply[2]], now_ms=claimed_ms)
        self._may_have_lost_reply = False
        jobs = tuple(
            _claimed(reply[at : at + _JOB_FIELDS], claimed_ms=claimed_ms, claimed_s=claimed_s, shard=self._shard)
            for at in range(_FIRST_JOB, len(reply), _JOB_FIELDS)
        )
        if is_quarantine_owner := bool(reply[1]):
            self._is_quarantine_turn = self._is_quarantine_turn != holds_nothing
        if jobs:
            self._bulk_owed = max(0.0, bulk_owed - sum(job.key in _BULK for job in jobs))
        return ClaimResult(jobs, is_quarantine_owner=is_quarantine_owner)

    def _announce(self, duplicates: Sequence[str], *, now_ms: float) -> None:
        """Announce the answers of duplicates that the last claim holds; if this fails, they return to their lane."""
        if not duplicates:
            return
        keys = [CLAIMS, LEASES, *map(result_key, duplicates)]
        expired = answered_before(self._worker, now_ms=now_ms)
        self._answer_duplicates(keys=keys, args=[self._token, self._result_ttl_s, expired, *duplicates])

    @property
    def has_lost_reply(self) -> bool:
        """Whether the last claim failed, so that the server may have run it, or may run it later."""
        return self._may_have_lost_reply

    def release_lost(self, held: Collection[str]) -> int:
        """Give up earlier claims, and release the jobs of the last one that are not among `held`; returns how many.

        Otherwise they would wait until their lease expires, and count as jobs of a crashed worker. Two round trips.
        """
        args = [self._claim_number, LAST_CLAIM_KEPT_MS]
        ids = msgspec.json.decode(self._end_claims(keys=[LEASES, self._last_claim_key], args=args), type=list[str])
        released = self.release([Release(job_id) for job_id in reversed(ids) if job_id not in held])
        self._may_have_lost_reply = False
        return released

    def end(self, held: Collection[str] = ()) -> int:
        """Claim nothing from now on, and do what `release_lost` does."""
        with self._lock:
            self._has_ended = True
        return self.release_lost(held)

    def renew(self, ids: Sequence[str]) -> list[str]:
        """Renew the leases; returns the ids that this worker no longer holds."""
        if not ids:
            return []
        lost: list[bytes] = self._renew(keys=[CLAIMS, LEASES], args=[self._token, self._lease_ms, *ids])
        return [job_id.decode() for job_id in lost]

    def release(self, releases: Sequence[Release]) -> int:
        """Release jobs; returns how many this worker still held. The last one of the list comes first in its lane."""
        if not releases:
            return 0
        args: list[Any] = [self._token, QUARANTINE_AFTER_DEATHS, HISTORY_TTL_S, *_LANE_KEYS]
        for item in releases:
            # Rounded up: with a delay of 0 the script counts an attempt as a worker death.
            args += [item.id, math.ceil(item.delay_s * 1000), int(item.counts), item.ending]
        keys = [CLAIMS, LEASES, ATTEMPTS, DELAYED, DELAYED_MESSAGES, QUARANTINE, HISTORIES, HISTORIES_EXPIRY]
        released: int = self._release(keys=[*keys, *_LANE_KEYS], args=args)
        return released


def _claimed(fields: Sequence[Any], *, claimed_ms: float, claimed_s: float, shard: int) -> Claimed:
    """One job from its fields in the reply of `claim.lua`."""
    job_id, attempt, deaths, lane_number, raw, is_revoked, history, generation = fields
    return Claimed(
        id=job_id.decode(),
        attempt=attempt,
        deaths=deaths,
        key=_LANE_KEYS[lane_number - 1],
        raw=raw,
        claimed_ms=claimed_ms,
        claimed_s=claimed_s,
        is_revoked=is_revoked == 1,
        history=history,
        generation=generation,
        shard=shard,
    )
