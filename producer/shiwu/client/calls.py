"""What the methods of `Client` send: checks their arguments, and gives the steps. The asyncio client uses it too."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Final, Self

import redis

from shiwu.broker.cancel import cancel_steps
from shiwu.broker.known_labels import KnownLabels, find_labels_steps
from shiwu.broker.queue_stats import QueueState, state_steps, sum_states, workers_steps
from shiwu.broker.redis_errors import info_of
from shiwu.broker.redis_url import read_redis_url
from shiwu.broker.retention import RetentionSteps
from shiwu.broker.sharding import shard_count_steps, shard_of
from shiwu.broker.steps import Steps, on_shard, on_shards
from shiwu.client.arguments import read_id, read_ids, read_integer, read_seconds, read_text, read_type, refused
from shiwu.client.dead_letters import (
    DeadFilter,
    DeadLetter,
    DeadPages,
    MergedDeadPages,
    drop_steps,
    requeue_steps,
    show_steps,
)
from shiwu.client.items import check_shared_fields, question_id, random_id, read_item, request_id
from shiwu.client.job_report import JobReport, JobState, report_steps
from shiwu.client.placing import dead_letters_steps, find_steps, jobs_steps, place_steps
from shiwu.client.results import TagResult, read_result
from shiwu.client.sender import MakeId, Sender, SendOptions
from shiwu.contract import check_id, result_key

DEFAULT_URL: Final = "redis://127.0.0.1:6379/0"
MAX_CONNECTIONS: Final = 64
"""How many connections a client opens at most for each purpose, by default."""
MAX_URL_CHARS: Final = 10_000
MAX_REASON_CHARS: Final = 100_000
CHECK_COUNT_S: Final = 60.0
"""Pause before the number of shards is compared again where shard 0 is unavailable."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The checked arguments of a client's constructor; times are in seconds."""

    redis_url: str
    max_waiting: int
    timeout_s: float
    max_connections: int
    shards: int = 1
    """How many the URL says; 1 without a cluster."""

    @classmethod
    def read(cls, redis_url: str | None, *, max_waiting: int, timeout_s: float, max_connections: int) -> Self:
        """Check the arguments; without a URL that of `SHIWU_REDIS_URL` is used.

        Raises:
            RedisUrlError: the URL is invalid.
            RequestError: another argument is invalid.
        """
        url = os.environ.get("SHIWU_REDIS_URL", DEFAULT_URL) if redis_url is None else redis_url
        url = read_text("redis_url", url, most=MAX_URL_CHARS)
        return cls(
            redis_url=url,
            max_waiting=read_integer("max_waiting", max_waiting, least=1),
            timeout_s=read_seconds("timeout_s", timeout_s, least=0.001),
            max_connections=read_integer("max_connections", max_connections, least=1),
            shards=read_redis_url(url, may_be_cluster=True).shards or 1,
        )


@dataclass(frozen=True, slots=True)
class Portions:
    """How the images of one call of `enqueue_many` are sent, portion by portion."""

    size: int
    """Images in a portion."""
    _sender: Sender
    _fields: Mapping[str, Any]
    _options: SendOptions
    _make_id: MakeId

    def send_steps(self, images: Sequence[str | Mapping[str, Any]]) -> Steps[list[str]]:
        """Check the images of one portion, and send all of them in one step; return the ids.

        Raises:
            RequestError: an item is invalid; nothing was sent.
        """
        items = [read_item(item, self._fields) for item in images]
        return (yield from self._sender.send_items_steps(items, self._options, make_id=self._make_id))

    def send(
        self, images: Iterable[str | Mapping[str, Any]], run: Callable[[Steps[list[str]]], list[str]]
    ) -> Iterator[str]:
        """Send all images; yield the ids of each portion once it is sent.

        Args:
            run: runs the steps of one portion.
        """
        rest = iter(images)
        while portion := list(islice(rest, self.size)):
            yield from run(self.send_steps(portion))


class Calls:
    """The steps of a client's methods; see `Client` for their arguments, results and errors.

    Arguments are checked when the steps are run, or immediately by methods that return no steps. Thread-safe.
    """

    def __init__(self, options: ClientOptions) -> None:
        self._shards = options.shards
        self._sender = Sender(max_waiting=options.max_waiting, timeout_s=options.timeout_s, shards=options.shards)
        self._limits = tuple(RetentionSteps() for _ in range(options.shards))
        self._check_count_s = 0.0 if options.shards > 1 else math.inf
        """When to compare the number of shards with that of the cluster, by the monotonic clock."""

    def count_steps(self) -> Steps[None]:
        """Compare the number of shards of the URL with that of the cluster, once; nothing on one server.

        Raises:
            WrongShardCount: the cluster was first used with another number.
        """
        if time.monotonic() < self._check_count_s:
            return
        self._check_count_s = time.monotonic() + CHECK_COUNT_S
        try:
            yield from on_shard(0, shard_count_steps(self._shards))
        except (redis.RedisError, OSError) as error:
            # The other shards can be used meanwhile.
            if not info_of(error).is_temporary:
                self._check_count_s = 0.0
                raise
        else:
            self._check_count_s = math.inf

    def enqueue_steps(
        self, fields: Mapping[str, Any], options: SendOptions, *, job_id: str | None, coalesce: bool
    ) -> Steps[str]:
        """Enqueue one image; return its id."""
        if job_id is not None and read_coalesce(coalesce, options):
            raise refused("id", "no id with coalesce, which derives one", job_id)
        make_id = question_id if read_coalesce(coalesce, options) else random_id
        [sent_id] = yield from self._sender.send_items_steps([(dict(fields), job_id)], options, make_id=make_id)
        return sent_id

    def portions(
        self,
        fields: Mapping[str, Any],
        options: SendOptions,
        *,
        batch_size: int,
        id_from: str | None,
        coalesce: bool,
    ) -> Portions:
        """How to send the images of one call of `enqueue_many`."""
        check_shared_fields(fields)
        read_integer("batch_size", batch_size, least=1)
        if id_from is not None and id_from != "reference":
            raise refused("id_from", "'reference' or None", id_from)
        make_id: MakeId = request_id if id_from else random_id
        if read_coalesce(coalesce, options):
            if id_from is not None:
                raise refused("id_from", "None with coalesce, which derives ids too", id_from)
            make_id = question_id
        size = min(batch_size, self._sender.max_waiting(options))
        return Portions(size, self._sender, fields, options, make_id)

    def cancel_steps(self, job_ids: str | Iterable[str], *, reason: str) -> Steps[list[str]]:
        """Answer jobs `cancelled`; return the ids that had no answer before."""
        ids = [check_id(job_id) for job_id in read_ids("job_ids", job_ids)]
        read_text("reason", reason, most=MAX_REASON_CHARS)
        placed = yield from place_steps(ids, shards=self._shards, knows=jobs_steps)
        found = yield from on_shards(
            {
                shard: cancel_steps(
                    group,
                    reason=reason,
                    clock=partial(self._sender.server_time_steps, shard),
                    limits=self._limits[shard].read_steps,
                )
                for shard, group in placed.items()
            }
        )
        return _in_order(ids, found)

    def time_steps(self) -> Steps[float]:
        """Redis' clock in ms since 1970; asked for once a minute."""
        return self._sender.server_time_steps()

    def answer_steps(self, job_id: str) -> Steps[TagResult | None]:
        """The answer of a job; None while there is none."""
        key = result_key(read_id(job_id))
        raw = yield from find_steps(job_id, shards=self._shards, find=lambda: _get_steps(key))
        return None if raw is None else read_result(raw)

    def explain_steps(self, job_id: str) -> Steps[JobReport]:
        """Where a job is and why."""
        own = shard_of(read_id(job_id), shards=self._shards)
        report = yield from on_shard(own, report_steps(job_id))
        if report.state is not JobState.UNKNOWN or self._shards == 1:
            return report
        others = {shard: report_steps(job_id) for shard in range(self._shards) if shard != own}
        found = (yield from on_shards(others)).values()
        return next((other for other in found if other.state is not JobState.UNKNOWN), report)

    def dead_letters(self, where: DeadFilter | None, *, limit: int | None) -> DeadPages | MergedDeadPages:
        """The dead letters that a filter selects."""
        where = read_type("where", where, (DeadFilter, type(None)), "a DeadFilter") or DeadFilter()
        if limit is not None:
            read_integer("limit", limit)
        if self._shards == 1:
            return DeadPages(where, limit=limit)
        return MergedDeadPages(where, limit=limit, shards=self._shards)

    def dead_letter_steps(self, job_id: str) -> Steps[DeadLetter | None]:
        """The dead letter of a job; None where there is none."""
        read_id(job_id)
        return (yield from find_steps(job_id, shards=self._shards, find=lambda: show_steps(job_id)))

    def requeue_steps(self, job_ids: str | Iterable[str]) -> Steps[list[str]]:
        """Put dead letters back into their lane; return the ids of those that were requeued."""
        ids = read_ids("job_ids", job_ids)
        placed = yield from place_steps(ids, shards=self._shards, knows=dead_letters_steps)
        found = yield from on_shards({shard: requeue_steps(group) for shard, group in placed.items()})
        return _in_order(ids, found)

    def drop_steps(self, job_ids: str | Iterable[str]) -> Steps[int]:
        """Delete dead letters; return how many were deleted."""
        ids = read_ids("job_ids", job_ids)
        placed = yield from place_steps(ids, shards=self._shards, knows=dead_letters_steps)
        found = yield from on_shards({shard: drop_steps(group) for shard, group in placed.items()})
        return sum(found.values())

    def labels_steps(self, digest: str) -> Steps[KnownLabels | None]:
        """The label set with this digest; None where it is not known."""
        read_text("digest", digest, least=1, most=200)
        return (yield from find_steps(digest, shards=self._shards, find=lambda: find_labels_steps(digest)))

    def state_steps(self) -> Steps[QueueState]:
        """The sizes of the queues, over all shards."""
        if self._shards == 1:
            return (yield from state_steps())
        states = yield from on_shards({shard: state_steps() for shard in range(self._shards)})
        return sum_states([states[shard] for shard in range(self._shards)])

    def workers_steps(self) -> Steps[tuple[str, ...]]:
        """Names of workers with a heartbeat in the last ten seconds, in any shard."""
        found = yield from on_shards({shard: workers_steps() for shard in range(self._shards)})
        return found[0] if self._shards == 1 else tuple(sorted(set(chain(*found.values()))))


def _get_steps(key: str) -> Steps[bytes | None]:
    raw: bytes | None = yield lambda client: client.get(key)
    return raw


def _in_order(ids: Sequence[str], found: Mapping[int, Sequence[str]]) -> list[str]:
    """The ids that the shards found, in the order of the caller."""
    if len(found) == 1:
        return list(*found.values())
    those = set(chain(*found.values()))
    return [job_id for job_id in dict.fromkeys(ids) if job_id in those]


def read_coalesce(coalesce: bool, options: SendOptions) -> bool:
    """Check `coalesce`, and that no option of one caller would apply to all who ask the same question.

    Raises:
        RequestError: it is no bool, or a duration is given too.
    """
    read_type("coalesce", coalesce, bool, "True or False")
    for name in ("expires_s", "answer_by_s", "countdown_s"):
        if coalesce and (value := getattr(options, name)) is not None:
            raise refused(
                name, "None with coalesce, because it would hold for all who ask; limit your wait instead", value
            )
    return coalesce


def read_waited_ids(job_ids: str | Iterable[str]) -> list[str]:
    """The ids to wait for, each once, in their order.

    Raises:
        RequestError: an id is invalid.
    """
    return list(dict.fromkeys(read_ids("job_ids", job_ids)))
