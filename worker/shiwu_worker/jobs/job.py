"""One picture on its way: what is known of it so far, and the answer made from that.

Also the other coins that pass between the rooms: what was claimed, what is given back.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING

import msgspec

from shiwu.broker.message_ids import find_id
from shiwu.broker.message_reader import Envelope, read_message
from shiwu.contract import (
    CONTRACT_VERSION,
    Answer,
    AnswerWarning,
    Attempt,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    Lane,
    ModelInfo,
    Request,
    RequestError,
    Stage,
    Status,
    Tag,
    field_warnings,
    is_digest,
    moment,
    parse_request,
    status_of,
    without_query,
)
from shiwu_worker.jobs.history import back_in_lane_ms, read_history
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.timestamps import StageTimestamps

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_vectors import EncodedLabels

_INTERACTIVE = frozenset(Lane.INTERACTIVE.keys)


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """A message in our hands until its lease ends."""

    id: str
    """The job id, or `~` and a digest where the message has no valid one."""
    attempt: int
    """1 for the first try; counted by job id over crashes, retries and copies."""
    key: str
    """The Redis list that it came from, and goes back to."""
    raw: bytes
    claimed_ms: float
    """Server time of the claim, in ms since 1970."""
    claimed_s: float
    """The same moment on this machine's monotonic clock (not earlier than the true one)."""
    is_revoked: bool = False
    """Whether Celery's revoke named it while it waited."""
    deaths: int = 0
    """How many workers died or hung while they held it, or lost their device with it."""
    history: bytes = b""
    """Earlier tries, as `history.read_history` reads them."""


class Release(msgspec.Struct, frozen=True, gc=False):
    """A job to give back. `delay_s` 0 puts it at the front of its lane."""

    id: str
    delay_s: float = 0.0
    counts: bool = False
    """Whether the try counts as an attempt."""
    ending: str = ""
    """`code|stage` of what ended this try, for the job's history; empty where it was none."""


class Departure(msgspec.Struct, frozen=True, gc=False):
    """A batch that left for the device; no two are equal."""

    reason: str
    """Why it left: full, free, closing."""
    size: int
    left_s: float


class Job(msgspec.Struct, eq=False):
    """A claimed job between claim and commit. Only one stage holds it at a time."""

    id: str
    """Names the claim: the job id, or a digest of a message whose id the claim could not find."""
    key: str
    attempt: int
    raw: bytes
    moments: StageTimestamps
    answer_id: str = ""
    """The job id, where the claim is named otherwise."""
    deaths: int = 0
    request: Request | None = None
    ignore_result: bool = False
    has_callbacks: bool = False
    """Whether its message carries Celery callbacks: link, chain, chord."""
    due_s: float = 0.0
    """Not before this moment of the monotonic clock (Celery's eta); 0 at once."""
    expires_s: float | None = None
    """Deadline on this machine's monotonic clock."""
    slot: int = -1
    image: ImageInfo | None = None
    label_set: LabelSet | None = None
    """As the request names it, from when the job is admitted."""
    labels: EncodedLabels | None = None
    """The label set with its vectors, from when the job is on its way to the device."""
    model: ModelInfo | None = None
    tags: tuple[Tag, ...] | None = None
    embedding: tuple[float, ...] | None = None
    batch_size: int | None = None
    departure: Departure | None = None
    """The batch that it left with, where traces are made."""
    scored_s: float = 0.0
    """When the tags were made: the end of the time that the answer tells of."""
    error: ErrorInfo | None = None
    is_final: bool = False
    """No other try is to be made, whatever the error's code says."""
    retry_after_s: float | None = None
    """The pause that the source of its image asks for."""
    is_untried: bool = False
    """Its source was not asked, because a pause was not over: this was no attempt."""
    status: Status = Status.TAGGED
    back: Release | None = None
    """Set when the job goes back to Redis instead of being answered."""
    warnings: tuple[AnswerWarning, ...] = ()
    """What the message itself gives reason to warn of."""
    is_on_device: bool = False
    is_accused: bool = False
    """It was on the device when the worker had to end; perhaps it is guilty."""
    history: tuple[Attempt, ...] = ()
    """Earlier tries, the oldest first."""
    is_answered_elsewhere: bool = False
    """Somebody else has answered it: its producer cancelled, or its time was over."""

    def fail(self, error: ErrorInfo) -> None:
        """End without tags; the status follows from the code."""
        self.error = error
        self.status = status_of(error.code)

    def unwanted(self, now_s: float) -> bool:
        """Whether nobody waits for the tags any more: it was answered aside, or its deadline has passed."""
        if self.is_answered_elsewhere:
            self.back = Release(self.id)
        return self.is_answered_elsewhere or self.expired(now_s)

    def expired(self, now_s: float) -> bool:
        """Whether the deadline has passed; if so the job ends as `expired`."""
        if self.expires_s is None or now_s < self.expires_s:
            return False
        self.fail(
            ErrorInfo(
                code=ErrorCode.EXPIRED,
                message=f"the deadline passed {now_s - self.expires_s:.3f} s before the picture was encoded",
                stage=Stage.BATCH if self.slot >= 0 else Stage.CLAIM,
            )
        )
        return True

    @property
    def log_id(self) -> str:
        """The id under which the caller looks for the answer."""
        return self.answer_id or self.id

    @property
    def lane(self) -> Lane:
        """The lane that its message lay in."""
        return Lane.INTERACTIVE if self.key in _INTERACTIVE else Lane.BULK

    def answer(self, *, worker: str, until_s: float, answered_at: datetime | None = None) -> Answer:
        """The terminal result, with the time of every stage so far."""
        warnings = self.warnings
        if self.labels is not None and self.status is Status.TAGGED:
            warnings += self.labels.warnings
        image = self.image
        if image is None and self.request is not None:
            image = ImageInfo(reference=without_query(self.request.image))
        # Some by position: for more than 15 keyword arguments CPython makes a dict, which doubles the time of the call.
        return Answer(
            self.answer_id or self.id,
            self.status,
            CONTRACT_VERSION,
            image,
            self.tags,
            self.label_set.info if self.label_set else None,
            model=self.model,
            timing=self.moments.timing(until_s),
            batch_size=self.batch_size,
            attempts=self.attempt,
            worker=worker,
            lane=self.lane,
            error=self.error,
            metadata=self.request.metadata if self.request else None,
            embedding=self.embedding,
            warnings=warnings or None,
            answered_at=answered_at,
            history=self.history or None,
        )

    def server_time(self, at_s: float) -> datetime:
        """A moment of this machine's monotonic clock, by Redis' clock as the claim of this job showed it."""
        moments = self.moments
        if not moments.claimed_ms:
            return datetime.now(UTC)
        return moment(moments.claimed_ms + (at_s - moments.claimed_s) * 1000)


def _note_returns(job: Job, envelope: Envelope) -> None:
    """Divide the time from enqueue to claim: earlier tries, pauses and a countdown, then the wait in the lane."""
    moments, sent_ms = job.moments, envelope.sent_ms
    returned_ms = max(sent_ms or 0.0, envelope.eta_ms or 0.0, back_in_lane_ms(job.history))
    in_lane_ms = min(returned_ms, moments.claimed_ms)
    moments.queue_ms = round(moments.claimed_ms - in_lane_ms, 3)
    if sent_ms is not None and in_lane_ms > sent_ms:
        moments.earlier_ms = round(in_lane_ms - sent_ms, 3)


def open_job(claimed: Claimed, *, zone: tzinfo = UTC) -> Job:
    """Read a claimed message. A message that breaks the contract gives a job that has already failed.

    Args:
        zone: time zone of an eta or expires that names none.
    """
    job = Job(
        id=claimed.id,
        key=claimed.key,
        attempt=claimed.attempt,
        deaths=claimed.deaths,
        raw=claimed.raw,
        moments=StageTimestamps(claimed_s=claimed.claimed_s, claimed_ms=claimed.claimed_ms),
    )
    if claimed.history:
        job.history = read_history(claimed.history)
    try:
        if claimed.id.startswith("~") and is_digest(claimed.id):
            job.answer_id = find_id(claimed.raw) or ""
        envelope = read_message(claimed.raw, zone=zone)
        job.ignore_result = envelope.ignore_result
        if job.history or envelope.eta_ms is not None:
            _note_returns(job, envelope)
        elif envelope.sent_ms is not None:
            # Not by `round`, which writes and reads the number.
            job.moments.queue_ms = max(0, int((claimed.claimed_ms - envelope.sent_ms) * 1000 + 0.5)) / 1000
        job.has_callbacks = bool(envelope.canvas)
        job.warnings = field_warnings(envelope.fields)
        # Server times become local ones by the moment of the claim, which both clocks saw.
        offset_s = claimed.claimed_s - claimed.claimed_ms / 1000
        if envelope.expires_ms is not None:
            job.expires_s = envelope.expires_ms / 1000 + offset_s
        if envelope.eta_ms is not None:
            job.due_s = envelope.eta_ms / 1000 + offset_s
        job.request = parse_request(envelope.fields)
        if claimed.is_revoked:
            raise RequestError(ErrorCode.CANCELLED, "revoked by Celery's remote control while it waited")
    except RequestError as error:
        job.fail(ErrorInfo(code=error.code, message=str(error), stage=Stage.CLAIM))
    except Exception as error:  # noqa: BLE001 border: a message that ends its reader would end one worker after another
        text = f"expected a message that can be read, got one that fails with {type(error).__name__}"
        job.fail(ErrorInfo(code=ErrorCode.MALFORMED_MESSAGE, message=text, stage=Stage.CLAIM))
    return job
