"""Reads what `shiwu top` shows: few commands, and nothing is written.

A look every two seconds sends four commands. The queue snapshot is that of the workers where they keep one, and is
counted here every 15 seconds where they do not. Workers, dead letters and backfills are listed every ten seconds. In
all that is less than five commands a second.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import redis

from shiwu.broker.queue_stats import QueueSnapshot, count_snapshot, kept_snapshot, read_workers
from shiwu.broker.redis_errors import explain
from shiwu.broker.server_clock import server_time_ms
from shiwu.broker.worker_state import read_worker_states
from shiwu.client.results import TagResult, read_answer
from shiwu.client.usual_times import usual_times
from shiwu.contract import BACKFILL, BACKFILLS, DEAD, DEAD_ANSWERS, RESULT_STREAM, Lane, Status, Timing
from shiwu.top.look import BackfillLook, FailureLook, Letter, Look, StageLook, WorkerLook
from shiwu.top.rates import LaneRates

COUNT_INTERVAL_MS: Final = 15_000.0
LIST_INTERVAL_S: Final = 10.0
SAMPLE: Final = 200
"""Newest answers that the stages are shown of."""
SAMPLE_PAGE: Final = 50
"""Answers that one look reads at most, except for the first one."""
MAX_LETTERS: Final = 500
MAX_BACKFILLS: Final = 5
ALIVE_MS: Final = 10_000.0
"""A backfill whose process has not written for so long does not run."""
STAGES: Final = ("queue", "claim", "fetch", "decode", "batch", "encode", "score")
_BACKFILL_FIELDS: Final = (
    *("phase", "wanted", "owner", "heartbeat_ms", "read", "sent"),
    *(f"status:{status}" for status in Status),
)


class LookReader:
    """Reads one look after the other. Used by one thread at a time; `letters` by any.

    Args:
        client: without retries, so that an outage is shown after one time-out.
        clock: gives monotonic seconds.
    """

    def __init__(self, client: redis.Redis, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = client
        self._clock = clock
        self._rates = LaneRates()
        self._snapshot: QueueSnapshot | None = None
        self._answers: deque[TagResult] = deque(maxlen=SAMPLE)
        self._newest_id: str | None = None
        self._workers: tuple[str, ...] = ()
        self._letters: dict[tuple[str, float], Letter] = {}
        self._backfills: tuple[BackfillLook, ...] = ()
        self._listed_s: float | None = None
        self._answered_s = clock()
        self._last = Look()

    def look(self) -> Look:
        """Read the service. An error of Redis is told in `problem`, beside the figures of the last look."""
        try:
            self._last = self.read()
        except (redis.RedisError, OSError) as error:
            problem = explain(error) if isinstance(error, redis.RedisError) else str(error)
            away_s = round(self._clock() - self._answered_s, 1)
            self._last = msgspec.structs.replace(self._last, problem=problem, away_s=away_s)
        return self._last

    def read(self) -> Look:
        """Read the service.

        Raises:
            redis.RedisError: Redis is unavailable, or refuses a command.
        """
        now_ms = server_time_ms(self._redis)
        snapshot = self._read_snapshot(now_ms)
        self._rates.add(snapshot)
        self._read_answers()
        if self._listed_s is None or self._clock() - self._listed_s >= LIST_INTERVAL_S:
            self._workers = read_workers(self._redis, now_ms=now_ms)
            self._read_letters()
            self._backfills = tuple(self._read_backfills(now_ms))
            self._listed_s = self._clock()
        states = read_worker_states(self._redis, self._workers)
        self._answered_s = self._clock()
        rate = self._rates.answers_per_s()
        timings = [answer.timing for answer in self._answers if answer.ok]
        lanes = [answer.lane for answer in self._answers if isinstance(answer.lane, Lane)]
        return Look(
            at_ms=now_ms,
            answers_per_s=None if rate is None else round(rate, 1),
            answered=snapshot.answered,
            delayed=snapshot.delayed,
            quarantined=snapshot.quarantined,
            dead=snapshot.dead,
            lanes=self._rates.lanes(now_ms=now_ms, answered=lanes),
            stages=stages_of(timings),
            sample=len(timings),
            workers=tuple(WorkerLook(name, states.get(name)) for name in sorted(self._workers)),
            failures=failures_of(self.known_letters, now_ms=now_ms),
            dead_read=len(self._letters),
            backfills=self._backfills,
        )

    def letters(self, code: str) -> list[Letter]:
        """The dead letters with this code, newest first, among the newest 500; asks nothing of Redis."""
        return [letter for letter in self.known_letters if letter.code == code]

    @property
    def known_letters(self) -> list[Letter]:
        """The newest 500 dead letters, newest first; asks nothing of Redis."""
        return list(self._letters.values())

    def newest(self, count: int) -> list[TagResult]:
        """The newest answers among those that the stages are shown of; asks nothing of Redis."""
        return list(self._answers)[-count:]

    def list_soon(self) -> None:
        """Let the next look list workers, dead letters and backfills again."""
        self._listed_s = None

    def _read_snapshot(self, now_ms: float) -> QueueSnapshot:
        """The workers' snapshot, or one that was counted here, whichever is newer; at most 15 s old."""
        known = kept_snapshot(self._redis)
        mine = self._snapshot
        # A value that another program wrote may be of any time.
        if known is None or known.at_ms > now_ms or (mine is not None and mine.at_ms > known.at_ms):
            known = mine
        if known is None or not 0 <= now_ms - known.at_ms < COUNT_INTERVAL_MS:
            known = count_snapshot(self._redis, now_ms=now_ms)
        self._snapshot = known
        return known

    def _read_answers(self) -> None:
        """Add the newest entries of the results stream to the sample."""
        oldest = "-" if self._newest_id is None else f"({self._newest_id}"
        end, fresh, newest_id = "+", [], None
        while True:
            entries: Any = self._redis.xrevrange(RESULT_STREAM, end, oldest, count=SAMPLE_PAGE)
            fresh += [read_answer(fields.get(b"answer", b""), job_id="") for _, fields in entries]
            if entries and newest_id is None:
                newest_id = entries[0][0].decode()
            if self._newest_id is not None or len(entries) < SAMPLE_PAGE or len(fresh) >= SAMPLE:
                break
            end = f"({entries[-1][0].decode()}"
        self._answers.extend(reversed(fresh))
        # Without any entry the next look reads from the beginning too.
        self._newest_id = newest_id or self._newest_id

    def _read_letters(self) -> None:
        found: Any = self._redis.zrevrange(DEAD, 0, MAX_LETTERS - 1, withscores=True)
        keys = [(job_id.decode(errors="replace"), died_ms) for job_id, died_ms in found]
        unknown = [key for key in keys if key not in self._letters]
        answers: Any = self._redis.hmget(DEAD_ANSWERS, [job_id for job_id, _ in unknown]) if unknown else []
        known = self._letters | {
            key: Letter(*key, read_answer(answer, job_id=key[0]))
            for key, answer in zip(unknown, answers, strict=True)
            if answer is not None
        }
        self._letters = {key: known[key] for key in keys if key in known}

    def _read_backfills(self, now_ms: float) -> list[BackfillLook]:
        names: Any = self._redis.zrevrange(BACKFILLS, 0, MAX_BACKFILLS - 1)
        looks = []
        for name in names:
            values: Any = self._redis.hmget(BACKFILL + name.decode(errors="replace"), list(_BACKFILL_FIELDS))
            fields = {
                field: value.decode(errors="replace")
                for field, value in zip(_BACKFILL_FIELDS, values, strict=True)
                if value is not None
            }
            # Its state expires a month after its end; the name stays.
            if fields:
                looks.append(_backfill(name.decode(errors="replace"), fields, now_ms=now_ms))
        return looks


def stages_of(timings: Sequence[Timing]) -> tuple[StageLook, ...]:
    """How long each stage took, and its share of the time."""
    usual = usual_times(timings)
    sums = {name: sum(getattr(timing, name) or 0.0 for timing in timings) for name in STAGES}
    whole = sum(sums.values()) or 1.0
    return tuple(
        StageLook(name, usual[name].p50, usual[name].p95, round(sums[name] / whole, 3))
        for name in STAGES
        if name in usual
    )


def failures_of(letters: Sequence[Letter], *, now_ms: float) -> tuple[FailureLook, ...]:
    """The codes, those of most letters first.

    Args:
        letters: the newest first.
    """
    counts = Counter(letter.code for letter in letters)
    newest: dict[str, Letter] = {}
    for letter in letters:
        newest.setdefault(letter.code, letter)
    return tuple(
        FailureLook(code, count, max(0.0, round((now_ms - newest[code].died_ms) / 1000, 1)), newest[code].stage)
        for code, count in counts.most_common()
    )


def _backfill(name: str, fields: Mapping[str, str], *, now_ms: float) -> BackfillLook:
    def number(field: str) -> int:
        with contextlib.suppress(ValueError):
            return int(fields.get(field, "0"))
        return 0

    heartbeat_ms = 0.0
    with contextlib.suppress(ValueError):
        heartbeat_ms = float(fields.get("heartbeat_ms", "0"))
    answered = sum(number(f"status:{status}") for status in Status)
    phase = fields.get("phase", "")
    if phase == "running" and fields.get("wanted") == "pause":
        phase = "paused"
    return BackfillLook(
        name=name,
        phase=phase,
        is_run=bool(fields.get("owner")) and now_ms - heartbeat_ms < ALIVE_MS,
        read=number("read"),
        sent=number("sent"),
        answered=answered,
        without_tags=answered - number(f"status:{Status.TAGGED}"),
    )
