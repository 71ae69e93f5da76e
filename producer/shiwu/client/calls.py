"""What the methods of `Client` send: checks their arguments, and gives the steps. The asyncio client uses it too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from shiwu.broker.cancel import cancel_steps
from shiwu.broker.known_labels import KnownLabels, find_labels_steps
from shiwu.broker.retention import RetentionSteps
from shiwu.broker.steps import Steps
from shiwu.client.arguments import read_id, read_ids, read_integer, read_seconds, read_text, read_type, refused
from shiwu.client.dead_letters import (
    DeadFilter,
    DeadLetter,
    DeadPages,
    drop_steps,
    requeue_steps,
    show_steps,
)
from shiwu.client.items import check_shared_fields, question_id, random_id, read_item, request_id
from shiwu.client.job_report import JobReport, report_steps
from shiwu.client.results import TagResult, read_result
from shiwu.client.sender import MakeId, Sender, SendOptions
from shiwu.contract import check_id, result_key

DEFAULT_URL: Final = "redis://127.0.0.1:6379/0"
MAX_CONNECTIONS: Final = 64
"""How many connections a client opens at most for each purpose, by default."""
MAX_URL_CHARS: Final = 10_000
MAX_REASON_CHARS: Final = 100_000


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The checked arguments of a client's constructor; times are in seconds."""

    redis_url: str
    max_waiting: int
    timeout_s: float
    max_connections: int

    @classmethod
    def read(cls, redis_url: str | None, *, max_waiting: int, timeout_s: float, max_connections: int) -> Self:
        """Check the arguments; without a URL that of `SHIWU_REDIS_URL` is used.

        Raises:
            RequestError: an argument is invalid.
        """
        url = os.environ.get("SHIWU_REDIS_URL", DEFAULT_URL) if redis_url is None else redis_url
        return cls(
            redis_url=read_text("redis_url", url, most=MAX_URL_CHARS),
            max_waiting=read_integer("max_waiting", max_waiting, least=1),
            timeout_s=read_seconds("timeout_s", timeout_s, least=0.001),
            max_connections=read_integer("max_connections", max_connections, least=1),
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


class Calls:
    """The steps of a client's methods; see `Client` for their arguments, results and errors.

    Arguments are checked when the steps are run, or immediately by methods that return no steps. Thread-safe.
    """

    def __init__(self, options: ClientOptions) -> None:
        self._sender = Sender(max_waiting=options.max_waiting, timeout_s=options.timeout_s)
        self._limits = RetentionSteps()

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
        return (yield from cancel_steps(ids, reason=reason, clock=self.time_steps, limits=self._limits.read_steps))

    def time_steps(self) -> Steps[float]:
        """Redis' clock in ms since 1970; asked for once a minute."""
        return self._sender.server_time_steps()

    def answer_steps(self, job_id: str) -> Steps[TagResult | None]:
        """The answer of a job; None while there is none."""
        key = result_key(read_id(job_id))
        raw = yield lambda client: client.get(key)
        return None if raw is None else read_result(raw)

    def explain_steps(self, job_id: str) -> Steps[JobReport]:
        """Where a job is and why."""
        return report_steps(read_id(job_id))

    def dead_letters(self, where: DeadFilter | None, *, limit: int | None) -> DeadPages:
        """The dead letters that a filter selects."""
        read_type("where", where, (DeadFilter, type(None)), "a DeadFilter")
        return DeadPages(where or DeadFilter(), limit=None if limit is None else read_integer("limit", limit))

    def dead_letter_steps(self, job_id: str) -> Steps[DeadLetter | None]:
        """The dead letter of a job; None where there is none."""
        return (yield from show_steps(read_id(job_id)))

    def requeue_steps(self, job_ids: str | Iterable[str]) -> Steps[list[str]]:
        """Put dead letters back into their lane; return the ids of those that were requeued."""
        return (yield from requeue_steps(read_ids("job_ids", job_ids)))

    def drop_steps(self, job_ids: str | Iterable[str]) -> Steps[int]:
        """Delete dead letters; return how many were deleted."""
        return (yield from drop_steps(read_ids("job_ids", job_ids)))

    def labels_steps(self, digest: str) -> Steps[KnownLabels | None]:
        """The label set with this digest; None where it is not known."""
        return (yield from find_labels_steps(read_text("digest", digest, least=1, most=200)))


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
