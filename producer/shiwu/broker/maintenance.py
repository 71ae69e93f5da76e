"""What anybody can do for all jobs: bring back those of dead workers, answer those that ran out of time.

Every worker does it once a second, and `shiwu sweep` does it where no worker runs. Many may do it at once: each step is
one script, and an answer counts once whoever gives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.answers import AnswerEntry, AnswerStore
from shiwu.broker.message_reader import Envelope, read_message
from shiwu.broker.retention import DEFAULT_RETENTION, Retention
from shiwu.broker.script_loader import load_script
from shiwu.broker.server_clock import server_time_ms
from shiwu.contract import (
    ATTEMPTS,
    CLAIMS,
    COUNTERS,
    DEAD,
    DEAD_ANSWERS,
    DEAD_MESSAGES,
    DEADLINES,
    DELAYED,
    DELAYED_MESSAGES,
    HISTORY,
    LEASES,
    QUARANTINE,
    RESULT_STREAM,
    REVOKED,
    WORKERS,
    Answer,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    RequestError,
    Stage,
    Status,
    check_id,
    moment,
    parse_request,
    without_query,
)

QUARANTINE_AFTER_DEATHS: Final = 2
"""Attempts that ended with their worker before a job is worked on alone."""
MAX_LEASE_S: Final = 600.0
"""No lease reaches further into the future, not even after the server's clock was set back."""
TRIMMED_AT_ONCE: Final = 5000
TAKEN_FOR_S: Final = 15.0
HISTORY_TTL_S: Final = 7 * 86_400
"""How long the earlier tries of a job that came back are kept for its next claim."""
CHUNK_SIZE: Final = 500
LOOKED_AT: Final = 20_000
"""Messages of each lane key that one sweep looks at for their `expires`."""
_LANE_KEYS: Final = tuple(key for lane in Lane for key in lane.keys)
_MAINTENANCE_KEYS: Final = (
    *(CLAIMS, LEASES, ATTEMPTS, DELAYED, DELAYED_MESSAGES, COUNTERS, WORKERS, QUARANTINE, DEADLINES),
    *(DEAD, DEAD_ANSWERS, DEAD_MESSAGES, RESULT_STREAM, REVOKED),
    *_LANE_KEYS,
)


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one round did and saw."""

    reaped: int = 0
    """Jobs taken back from workers whose leases ended."""
    promoted: int = 0
    """Jobs whose delay is over."""
    suspects: int = 0
    """Jobs that wait to be worked on alone."""
    waiting: int = 0
    """Messages in all lanes, suspects included; of the lanes only where it was asked for."""
    stream_length: int = 0
    out_of_time: int = 0
    """Jobs answered `expired` because their waiter's time was over."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep did."""

    reaped: int
    promoted: int
    out_of_time: int
    expired: int
    """Waiting messages whose `expires` had passed."""
    results_dropped: dict[str, int]
    """Consumer group → unacknowledged answers that the stream no longer holds."""
    not_looked_at: int = 0
    """Waiting messages of long lanes that the next rounds look at."""

    @property
    def did_something(self) -> bool:
        """Whether anything was due."""
        return bool(self.reaped or self.promoted or self.out_of_time or self.expired or self.results_dropped)


class Maintenance:
    """One who tends. Thread-safe; raises redis.RedisError.

    Args:
        name: shown among the workers; empty for who is none.
        keep: how many answers the results stream keeps, and how long dead letters; or who knows it.
    """

    def __init__(
        self,
        client: redis.Redis,
        answer_store: AnswerStore,
        *,
        name: str = "",
        token: str = "",
        retention: Callable[[], Retention] = lambda: DEFAULT_RETENTION,
    ) -> None:
        self._client = client
        self._answer_store = answer_store
        self._name = name
        self._token = token
        self._retention = retention
        self._maintain = load_script(client, "maintain")
        self._trim = load_script(client, "trim")
        self._take_late = load_script(client, "take_late")
        self._kept: dict[str, int] = {}
        """Lane key → messages at its head that the last sweep looked at and left."""

    def run_once(self, *, limit: int = CHUNK_SIZE, count_waiting: bool = False) -> MaintenanceReport:
        """One portion of everything that is due."""
        limits = (
            QUARANTINE_AFTER_DEATHS,
            int(MAX_LEASE_S * 1000),
            self._retention().dead_age_s * 1000,
            HISTORY,
            HISTORY_TTL_S,
        )
        reply: Any = self._maintain(keys=_MAINTENANCE_KEYS, args=[self._name, limit, int(count_waiting), *limits])
        reaped, promoted, suspects, waiting, stream_length, late, now_ms = reply
        if late:
            self._end_late(late, now_ms=now_ms)
        return MaintenanceReport(
            reaped=reaped,
            promoted=promoted,
            suspects=suspects,
            waiting=waiting,
            stream_length=stream_length,
            out_of_time=len(late),
        )

    def _end_late(self, late: Sequence[bytes], *, now_ms: float) -> None:
        ids = {member: _valid_id(member) for member in late}
        text = "no answer came by the time that the producer gave (answer_by)"
        self._answer_store.write([_out_of_time(job_id, text, now_ms=now_ms) for job_id in ids.values() if job_id])
        if strange := [member for member, job_id in ids.items() if not job_id]:
            self._client.zrem(DEADLINES, *strange)  # by another hand; it would come back each second

    def sweep(self, *, zone: tzinfo = UTC) -> SweepReport:
        """A whole round: everything that is due, portion by portion, and the waiting messages that have expired.

        Args:
            zone: time zone of an `expires` that names none.
        """
        rounds = [self.run_once()]
        while max(rounds[-1].reaped, rounds[-1].promoted, rounds[-1].out_of_time) == CHUNK_SIZE:
            rounds.append(self.run_once())
        expired, unseen = self._expire_waiting(portion=CHUNK_SIZE, most=LOOKED_AT, zone=zone)
        return SweepReport(
            reaped=sum(one.reaped for one in rounds),
            promoted=sum(one.promoted for one in rounds),
            out_of_time=sum(one.out_of_time for one in rounds),
            expired=expired,
            not_looked_at=unseen,
            results_dropped=self.trim_if_long(rounds[-1]),
        )

    def trim(self) -> dict[str, int]:
        """Shorten the results stream; return for each consumer group how many unacknowledged answers it lost."""
        reply: Any = self._trim(keys=[RESULT_STREAM, COUNTERS], args=[self._retention().stream_length, TRIMMED_AT_ONCE])
        return {reply[i].decode(errors="replace"): reply[i + 1] for i in range(1, len(reply), 2)}

    def trim_if_long(self, seen: MaintenanceReport) -> dict[str, int]:
        """The same where the last round found the stream too long; costs nothing otherwise."""
        return self.trim() if seen.stream_length > self._retention().stream_length else {}

    def expire_waiting(self, *, portion: int = CHUNK_SIZE, most: int = LOOKED_AT, zone: tzinfo = UTC) -> int:
        """Answer waiting messages whose `expires` has passed; return how many.

        A worker does this at its claims; here it is done for those who wait while there is none. It looks at `most`
        messages of each lane key, oldest first, and goes on from there in the next round.
        """
        return self._expire_waiting(portion=portion, most=most, zone=zone)[0]

    def _expire_waiting(self, *, portion: int, most: int, zone: tzinfo) -> tuple[int, int]:
        """How many were answered, and how many messages were not looked at."""
        now_ms = server_time_ms(self._client)
        expired = unseen = 0
        for key in _LANE_KEYS:
            begin = kept = self._kept.get(key, 0)
            seen = stayed = 0
            is_at_end = False
            while seen < most and not is_at_end:
                raws: Any = self._client.lrange(key, -(kept + portion), -(kept + 1))
                taken, answered = self._end_expired(key, raws, now_ms=now_ms, zone=zone)
                expired += answered
                seen += len(raws)
                stayed += len(raws) - taken
                # What was taken is gone, and what follows has moved up.
                kept += len(raws) - taken
                if len(raws) < portion:
                    # Where the lane has become shorter than the last round left it, this round begins at its head.
                    is_at_end = seen > 0 or begin == 0
                    begin, kept = (begin, 0) if is_at_end else (0, 0)
            self._kept[key] = kept
            if begin or not is_at_end:
                unseen += max(0, self._client.llen(key) - stayed)
        return expired, unseen

    def _end_expired(self, key: str, raws: Sequence[bytes], *, now_ms: float, zone: tzinfo) -> tuple[int, int]:
        """Answer the expired ones of a portion; how many were taken out of the lane, and how many answers are new."""
        late = []
        for raw in raws:
            try:
                envelope = read_message(raw, zone=zone)
            except RequestError:
                continue  # a worker buries it
            if envelope.expires_ms is not None and envelope.expires_ms <= now_ms:
                late.append((envelope, raw))
        if not late:
            return 0, 0
        args: list[Any] = [self._token, int(TAKEN_FOR_S * 1000)]
        for envelope, raw in late:
            args += [envelope.id, raw]
        taken = set(self._take_late(keys=[CLAIMS, LEASES, key], args=args))
        entries = [
            _expired(envelope, key, raw, now_ms=now_ms) for envelope, raw in late if envelope.id.encode() in taken
        ]
        return len(taken), len(entries) - len(self._answer_store.write(entries, token=f"{self._token}.lane"))


def _valid_id(member: bytes) -> str:
    """The job id, or empty where there is none."""
    with contextlib.suppress(RequestError, UnicodeDecodeError):
        return check_id(member.decode())
    return ""


def _out_of_time(job_id: str, text: str, *, now_ms: float) -> AnswerEntry:
    error = ErrorInfo(code=ErrorCode.EXPIRED, message=text, stage=Stage.CLAIM)
    answer = Answer(id=job_id, status=Status.EXPIRED, attempts=0, error=error, answered_at=moment(now_ms))
    return AnswerEntry(id=job_id, answer=answer, is_aside=True)


def _expired(envelope: Envelope, key: str, raw: bytes, *, now_ms: float) -> AnswerEntry:
    text = "the deadline passed while the job waited and no worker ran"
    answer = _out_of_time(envelope.id, text, now_ms=now_ms).answer
    with contextlib.suppress(RequestError):
        request = parse_request(envelope.fields)
        image = ImageInfo(reference=without_query(request.image))
        answer = msgspec.structs.replace(answer, image=image, metadata=request.metadata)
    return AnswerEntry(
        id=envelope.id,
        answer=answer,
        ignore_result=envelope.ignore_result,
        message=key.encode() + b"|" + raw if envelope.canvas else b"",
        has_callbacks=bool(envelope.canvas),
    )
