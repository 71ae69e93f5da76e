"""Maintenance by a client, in all shards."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from datetime import tzinfo

import redis

from shiwu.broker.answers import AnswerStore
from shiwu.broker.maintenance import Maintenance, SweepReport
from shiwu.broker.migration import check_names
from shiwu.broker.retention import PublishedRetention


class Sweeper:
    """Does the maintenance of each shard, one after the other. Thread-safe.

    Args:
        clients: one for each shard.
    """

    def __init__(self, clients: Sequence[redis.Redis]) -> None:
        token = f"client.{secrets.token_hex(4)}"
        self.shards = [_open(client, token=token) for client in clients]
        """The maintenance of each shard."""
        self._clients = tuple(clients)
        self._checked: set[int] = set()

    def sweep(self, *, zone: tzinfo) -> SweepReport:
        """Do everything that is due in all shards.

        Raises:
            OldNames: a shard holds jobs under names of an earlier version; it was not swept.
            redis.RedisError: a shard is unavailable; the others were swept.
        """
        reports: list[SweepReport] = []
        failure: redis.RedisError | OSError | None = None
        for index, shard in enumerate(self.shards):
            try:
                if index not in self._checked:
                    check_names(self._clients[index])
                    self._checked.add(index)
                reports.append(shard.sweep(zone=zone))
            except (redis.RedisError, OSError) as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return reports[0] if len(reports) == 1 else _sum(reports)


def _open(client: redis.Redis, *, token: str) -> Maintenance:
    limits = PublishedRetention(client)
    store = AnswerStore(client, token=token, retention=limits)
    return Maintenance(client, store, token=token, retention=limits)


def _sum(reports: Sequence[SweepReport]) -> SweepReport:
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.results_dropped)
    return SweepReport(
        reaped=sum(report.reaped for report in reports),
        promoted=sum(report.promoted for report in reports),
        out_of_time=sum(report.out_of_time for report in reports),
        expired=sum(report.expired for report in reports),
        results_dropped=dict(dropped),
        not_looked_at=sum(report.not_looked_at for report in reports),
        foreign=[value for report in reports for value in report.foreign],
    )
