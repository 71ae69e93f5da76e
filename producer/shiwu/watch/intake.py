"""Makes jobs of messages: reads them, finds the rule of each object, enqueues, and keeps what cannot be read."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import redis

from shiwu.client.client import Client
from shiwu.contract import printable
from shiwu.errors import QueueFull
from shiwu.watch.events import Finding, ObjectStored, Reason, Unreadable
from shiwu.watch.rules import Rule, Rules
from shiwu.watch.unread import UnreadMessage, as_text, keep_unread

MAX_RECENT: Final = 65_536
"""Ids that this process has enqueued and does not enqueue again; about 10 MB. The worker folds older duplicates."""


class Outcome(StrEnum):
    """What became of an event, apart from the reasons to ignore it."""

    ENQUEUED = "enqueued"
    UNREAD = "unread"


OUTCOMES: Final = (*Outcome, *Reason)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a source, and what it says."""

    body: bytes | str
    findings: Sequence[Finding]


@dataclass(slots=True)
class Plan:
    """What is left to do for a portion of messages. `Intake.carry_out` removes what is done."""

    jobs: dict[int, dict[str, str]] = field(default_factory=dict)
    """Index of the rule → id → reference."""
    unread: list[UnreadMessage] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """What becomes of the events, by the words of `OUTCOMES`."""


class Intake:
    """Makes jobs of messages. Thread-safe.

    Args:
        keeper: a client of shiwu's Redis, for messages that cannot be read.
        source: names the source in these, without a password.
        max_waiting: how many messages a lane may hold; None: the limit of the client.
        replicas: how many replicas of Redis must confirm the jobs, and what could not be read.
    """

    def __init__(
        self,
        client: Client,
        keeper: redis.Redis,
        rules: Rules,
        *,
        source: str,
        max_waiting: int | None = None,
        replicas: int = 0,
    ) -> None:
        self._client = client
        self._keeper = keeper
        self._rules = rules
        self._source = source
        self._max_waiting = max_waiting
        self._replicas = replicas
        self._recent: dict[str, None] = {}
        self._lock = threading.Lock()

    def plan(self, messages: Iterable[Message]) -> Plan:
        """Read the messages and find their rules; sends nothing."""
        plan = Plan()
        planned: set[str] = set()
        for message in messages:
            reasons = []
            for finding in message.findings:
                if isinstance(finding, Unreadable):
                    reasons.append(finding.reason)
                elif isinstance(finding, ObjectStored):
                    plan.counts[self._add(plan, planned, finding)] += 1
                else:
                    plan.counts[finding.reason] += 1
            if reasons:
                plan.counts[Outcome.UNREAD] += len(reasons)
                plan.unread.append(
                    UnreadMessage(source=self._source, reason=printable(reasons[0]), body=as_text(message.body))
                )
        return plan

    def carry_out(self, plan: Plan) -> None:
        """Enqueue the jobs of a plan and keep what could not be read, without waiting. May be repeated after an error.

        Raises:
            QueueFull: a lane holds its limit; the jobs for the other lane are enqueued.
            NotReplicated: too few replicas confirmed a part; repeating the call writes that part again.
            redis.RedisError: Redis is unavailable, or refuses.
        """
        full: QueueFull | None = None
        for index in list(plan.jobs):
            try:
                self._enqueue(self._rules.all[index], plan.jobs[index])
                del plan.jobs[index]
            except QueueFull as error:
                full = full or error
        if plan.unread:
            keep_unread(self._keeper, plan.unread, at_ms=self._client.server_time_ms(), replicas=self._replicas)
            plan.unread.clear()
        if full is not None:
            raise full

    def _add(self, plan: Plan, planned: set[str], stored: ObjectStored) -> str:
        index = self._rules.find(stored)
        if index is None:
            return Reason.NO_RULE
        job_id = stored.id
        if job_id in planned or job_id in self._recent:
            return Reason.DUPLICATE
        planned.add(job_id)
        has_version = self._rules.all[index].has_version
        plan.jobs.setdefault(index, {})[job_id] = stored.reference(has_version=has_version)
        return Outcome.ENQUEUED

    def _enqueue(self, rule: Rule, jobs: dict[str, str]) -> None:
        options = rule.options
        sent = self._client.enqueue_many(
            [{"image": reference, "id": job_id} for job_id, reference in jobs.items()],
            lane=options.lane,
            priority=options.priority,
            expires_s=options.expires_s,
            answer_by_s=options.answer_by_s,
            batch_size=len(jobs),
            max_waiting=self._max_waiting,
            replicas=self._replicas,
            **rule.fields,
        )
        # The ids come in portions, where the lane may hold fewer messages; what is enqueued is not sent again.
        for job_id in sent:
            del jobs[job_id]
            self._remember(job_id)

    def _remember(self, job_id: str) -> None:
        with self._lock:
            self._recent[job_id] = None
            if len(self._recent) > MAX_RECENT:
                del self._recent[next(iter(self._recent))]
