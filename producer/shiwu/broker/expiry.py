"""Answers jobs `expired` whose deadline has passed, wherever their message is."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import tzinfo
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.deadline_scan import DeadlineScan, late_messages
from shiwu.broker.marks import read_marks
from shiwu.broker.message_reader import Envelope, read_message
from shiwu.broker.script_loader import load_repeatable_script
from shiwu.broker.server_clock import server_time_ms
from shiwu.contract import (
    ATTEMPTS,
    CANVAS,
    CANVAS_DUE,
    CLAIMS,
    COUNTERS,
    DEADLINES,
    LEASES,
    MARKS,
    PENDING_ANSWERS,
    PENDING_ANSWERS_EXPIRY,
    QUARANTINE,
    Answer,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    RequestError,
    Stage,
    Status,
    moment,
    parse_request,
    without_query,
)

EXPIRY_LEASE_S: Final = 15.0
"""Lease of an expired message between its removal from the lane and its answer."""
CHUNK_SIZE: Final = 500
MAX_CHECKED: Final = 20_000
"""Messages of each lane key whose `expires` one sweep checks."""
MAX_SCANNED: Final = 1000
"""Messages of lanes that one round looks through for passed deadlines."""
_DROP_KEYS: Final = (CANVAS, CANVAS_DUE, COUNTERS, PENDING_ANSWERS, PENDING_ANSWERS_EXPIRY, *MARKS)
_LANE_KEYS: Final = tuple(key for lane in Lane for key in lane.keys)


class Expiry:
    """Answers messages whose own deadline has passed. Raises redis.RedisError, after which it may be called again.

    Args:
        token: unique to one run of the process; marks the answers that it writes.
    """

    def __init__(self, client: redis.Redis, answer_store: AnswerStore, *, token: str) -> None:
        self._client = client
        self._answer_store = answer_store
        self._token = token
        self._take_late = load_repeatable_script(client, "take_late")
        self._drop_answered = load_repeatable_script(client, "drop_answered")
        self._scan = DeadlineScan(client)
        self._checked: dict[str, int] = {}
        """Lane key → messages at its head that the last sweep checked and left in place."""

    @property
    def scanned_ms(self) -> float:
        """When the last finished scan of all lists began, by Redis' clock; 0 before the first one."""
        return self._scan.finished_ms

    def scan(self, *, now_ms: float, zone: tzinfo) -> int:
        """Look through the next messages of quarantine and lanes; return how many jobs were answered."""
        return self._answer_late(self._scan.step(now_ms=now_ms, limit=MAX_SCANNED, zone=zone), now_ms=now_ms)

    def answer_due(self, records: Mapping[bytes, bytes], *, now_ms: float, zone: tzinfo) -> int:
        """Answer those of these claimed or delayed messages whose deadline has passed, and correct the others' entries.

        Args:
            records: entry of the deadlines → `lane key|message`.
        """
        late: list[tuple[str, Envelope]] = []
        unfounded: list[bytes] = []
        later: dict[bytes, float] = {}
        for member, record in records.items():
            try:
                envelope = read_message(record.partition(b"|")[2], zone=zone)
                claim = member.decode()
            except (RequestError, UnicodeDecodeError):
                unfounded.append(member)  # a worker answers it with this error
                continue
            if envelope.expires_ms is not None and envelope.expires_ms <= now_ms:
                late.append((claim, envelope))
            elif envelope.answer_by_ms is not None:
                later[member] = envelope.answer_by_ms
            else:
                unfounded.append(member)
        if later:
            self._client.zadd(DEADLINES, later, xx=True)
        if unfounded:
            self._client.zrem(DEADLINES, *unfounded)
        entries = [_out_of_time(envelope, now_ms=now_ms, claim=claim) for claim, envelope in late]
        return len(entries) - len(self._answer_store.write(entries))

    def _answer_late(self, late: Sequence[Envelope], *, now_ms: float) -> int:
        """Answer messages of lanes and quarantine, which stay there until their claim drops them."""
        if not late:
            return 0
        marks = read_marks(self._client, [envelope.id for envelope in late])
        entries = [
            _out_of_time(envelope, now_ms=now_ms) for envelope, mark in zip(late, marks, strict=True) if mark is None
        ]
        return len(entries) - len(self._answer_store.write(entries))

    def expire_waiting(self, *, portion: int, limit: int, zone: tzinfo) -> tuple[int, int]:
        """How many messages were answered, and how many were not checked."""
        now_ms = server_time_ms(self._client)
        expired = unchecked = 0
        for key in _LANE_KEYS:
            begin = offset = self._checked.get(key, 0)
            checked = left = 0
            is_at_end = False
            while checked < limit and not is_at_end:
                raws: Any = self._client.lrange(key, -(offset + portion), -(offset + 1))
                taken, answered = self._answer_expired(key, raws, now_ms=now_ms, zone=zone)
                expired += answered
                checked += len(raws)
                left += len(raws) - taken
                # Messages that were taken are gone from the list, so those behind them have moved up.
                offset += len(raws) - taken
                if len(raws) < portion:
                    # A lane that has become shorter than the stored offset is checked again from its head.
                    is_at_end = checked > 0 or begin == 0
                    begin, offset = (begin, 0) if is_at_end else (0, 0)
            self._checked[key] = offset
            if begin or not is_at_end:
                unchecked += max(0, self._client.llen(key) - left)
        return expired, unchecked

    def expire_quarantined(self, *, zone: tzinfo) -> int:
        """Answer quarantined messages whose deadline has passed; they stay there until their claim drops them."""
        now_ms, answered = server_time_ms(self._client), 0
        for begin in range(0, MAX_CHECKED, CHUNK_SIZE):
            records: Any = self._client.lrange(QUARANTINE, -(begin + CHUNK_SIZE), -(begin + 1))
            answered += self._answer_late(
                list(late_messages(QUARANTINE, records, now_ms=now_ms, zone=zone)), now_ms=now_ms
            )
            if len(records) < CHUNK_SIZE:
                break
        return answered

    def _answer_expired(self, key: str, raws: Sequence[bytes], *, now_ms: float, zone: tzinfo) -> tuple[int, int]:
        """Answer the expired messages; how many were removed from the lane, and how many answers are new."""
        read = []
        for raw in reversed(raws):  # the oldest first, as in a claim
            with contextlib.suppress(RequestError):  # a worker answers it with this error
                read.append((read_message(raw, zone=zone), raw))
        dropped = self._drop_if_answered(key, read)
        late = [(one, raw) for one, raw in read if one.expires_ms is not None and one.expires_ms <= now_ms]
        if not late:
            return dropped, 0
        args: list[Any] = [self._token, int(EXPIRY_LEASE_S * 1000), key]
        for envelope, raw in late:
            args += [envelope.id, raw]
        reply: Any = self._take_late(keys=[CLAIMS, LEASES, ATTEMPTS, key], args=args)
        taken = dict(zip(reply[::2], reply[1::2], strict=True))
        entries = [
            _taken(envelope, key, raw, now_ms=now_ms, generation=taken[number])
            for number, (envelope, raw) in enumerate(late, start=1)
            if number in taken
        ]
        # A token of this call: a copy of a job that an earlier call answered must not pass for a repeated commit.
        token = f"{self._token}.lane.{secrets.token_hex(4)}"
        return dropped + len(taken), len(entries) - len(self._answer_store.write(entries, token=token))

    def _drop_if_answered(self, key: str, read: Sequence[tuple[Envelope, bytes]]) -> int:
        """Remove messages whose jobs were cancelled or out of time while they waited; return how many."""
        if not read:
            return 0
        answers: Any = self._client.hmget(PENDING_ANSWERS, [envelope.id for envelope, _ in read])
        found = [pair for pair, answer in zip(read, answers, strict=True) if answer is not None]
        if not found:
            return 0
        args: list[Any] = [key]
        for envelope, raw in found:
            args += [envelope.id, raw]
        dropped: int = self._drop_answered(keys=[key, *_DROP_KEYS], args=args)
        return dropped


def _out_of_time(envelope: Envelope, *, now_ms: float, claim: str = "") -> AnswerEntry:
    """The answer for a job that a claim, a delay, a lane or the quarantine still holds."""
    return AnswerEntry(
        id=envelope.id,
        answer=_expired(envelope, "no answer came by the time that the producer gave (answer_by)", now_ms=now_ms),
        claim=claim if claim != envelope.id else "",
        ignore_result=envelope.ignore_result,
        is_from_outside=True,
    )


def _expired(envelope: Envelope, text: str, *, now_ms: float) -> Answer:
    error = ErrorInfo(code=ErrorCode.EXPIRED, message=text, stage=Stage.CLAIM)
    answer = Answer(id=envelope.id, status=Status.EXPIRED, attempts=0, error=error, answered_at=moment(now_ms))
    with contextlib.suppress(RequestError):
        request = parse_request(envelope.fields)
        image = ImageInfo(reference=without_query(request.image))
        return msgspec.structs.replace(answer, image=image, metadata=request.metadata, callback=request.callback)
    return answer


def _taken(envelope: Envelope, key: str, raw: bytes, *, now_ms: float, generation: int) -> AnswerEntry:
    """The answer for a message that was taken out of its lane."""
    return AnswerEntry(
        id=envelope.id,
        answer=_expired(envelope, "the deadline passed while the job waited and no worker ran", now_ms=now_ms),
        ignore_result=envelope.ignore_result,
        message=key.encode() + b"|" + raw if envelope.canvas else b"",
        has_callbacks=bool(envelope.canvas),
        has_reply_to=envelope.has_reply_to,
        generation=generation,
    )
