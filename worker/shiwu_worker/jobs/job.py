"""A job between claim and commit, and the answer made from it.

Also defines the small records that the stages exchange: a claimed message, a release, a batch that was launched.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING, Final

import msgspec

from shiwu.broker.history import back_in_lane_ms, read_history
from shiwu.broker.message_ids import find_id
from shiwu.broker.message_reader import Envelope, read_message
from shiwu.contract import (
    CONTRACT_VERSION,
    Answer,
    AnswerWarning,
    Attempt,
    Cache,
    ErrorCode,
    ErrorInfo,
    ImageInfo,
    LabelsInfo,
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
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.timestamps import StageTimestamps

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from shiwu_worker.jobs.label_vectors import EncodedLabels

_LANES: Final = {key: lane for lane in Lane for key in lane.keys}


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """A message that this worker holds under a lease."""

    id: str
    """The job id, or `~` and a digest where the message has no valid one."""
    attempt: int
    """1 for the first attempt; counted by job id over crashes, retries and duplicates."""
    key: str
    """The Redis list from which the message came, and to which it returns."""
    raw: bytes
    claimed_ms: float
    """Server time of the claim, in ms since 1970."""
    claimed_s: float
    """The time of the claim on this machine's monotonic clock; never earlier than the true one."""
    is_revoked: bool = False
    """Whether Celery's `revoke` named the job while it waited."""
    deaths: int = 0
    """How many workers crashed, hung or lost their device while they held the job."""
    history: bytes = b""
    """Earlier attempts, as `history.read_history` reads them."""
    generation: int = 0
    """How often the id was requeued as a dead letter."""
    shard: int = 0
    """Index of the shard that the message came from; 0 on one server."""


class Release(msgspec.Struct, frozen=True, gc=False):
    """Gives a claimed job back to Redis. With `delay_s` 0 it goes to the front of its lane."""

    id: str
    delay_s: float = 0.0
    counts: bool = False
    """Whether this try counts as an attempt."""
    ending: str = ""
    """`code|stage` of what ended this attempt, for the job's history; empty where it was no attempt."""
    shard: int = 0
    """Index of the shard that the job came from."""


class Departure(msgspec.Struct, frozen=True, gc=False):
    """A batch that was sent to the device. Traces find the jobs of a batch by it: no two batches have one `left_s`."""

    reason: str
    """Why the batch was sent: full, free, closing."""
    size: int
    left_s: float


class Job(msgspec.Struct, eq=False):
    """A claimed job between claim and commit.

    One stage holds a job at a time, and only the thread of that stage writes its fields: the claim thread up to the
    submission to the loaders, the loader pool's thread up to the batcher, the encode thread up to the launch, the score
    thread up to the commit, and then the commit thread. There are two exceptions. The cancellation thread sets
    `is_answered_elsewhere` at any time. A thread that ends the process sets `is_suspected`, and so does no other.
    """

    id: str
    """Identifies the claim: the job id, or a digest of a message whose id the claim could not find."""
    key: str
    attempt: int
    raw: bytes
    moments: StageTimestamps
    answer_id: str = ""
    """The job id, where `id` is a digest."""
    generation: int = 0
    """How often the id was requeued as a dead letter. An answer counts only for the generation that was claimed."""
    deaths: int = 0
    request: Request | None = None
    ignore_result: bool = False
    has_callbacks: bool = False
    """Whether its message carries Celery callbacks: link, chain, chord."""
    has_reply_to: bool = False
    """Whether a Celery client waits for its answer."""
    due_s: float = 0.0
    """The job must not start before this time of the monotonic clock (Celery's eta); 0 for immediately."""
    expires_s: float | None = None
    """Deadline on this machine's monotonic clock."""
    slot: int = -1
    has_pixels: bool = False
    """Whether the pixels of its image are in its slot."""
    image: ImageInfo | None = None
    sha256: str = ""
    """Hash of the file of its image, in hexadecimal; empty until it is fetched."""
    leader: Job | None = None
    """The job with the same image whose vector this one waits for."""
    shared_vector: NDArray[float32] | None = None
    """The unit vector (d) of its image, where another job encoded it."""
    is_not_modified: bool = False
    """Whether the source said that the image is the one that the worker knows, so that no bytes were moved."""
    cache: Cache | None = None
    """Where the vector came from, if another job encoded the image."""
    label_set: LabelSet | None = None
    """The label set that the request names; set when the job is admitted."""
    labels: EncodedLabels | None = None
    """The label set with its vectors; None while these are being computed."""
    model: ModelInfo | None = None
    tags: tuple[Tag, ...] | None = None
    embedding: tuple[float, ...] | None = None
    vector: str | None = None
    """Unit vector as the answer has it: float16, little-endian, in base64."""
    batch_size: int | None = None
    departure: Departure | None = None
    """The batch that the job was sent with; set where traces are made."""
    scored_s: float = 0.0
    """When the tags were made, which is where the times of the answer end."""
    error: ErrorInfo | None = None
    status: Status = Status.TAGGED
    warnings: tuple[AnswerWarning, ...] = ()
    """Warnings about the message."""
    is_on_device: bool = False
    is_suspected: bool = False
    """The job was on the device when the worker failed, so that it may be the cause."""
    history: tuple[Attempt, ...] = ()
    """Earlier attempts, the oldest first."""
    is_answered_elsewhere: bool = False
    """Its producer cancelled the job, or another process answered it because its time was over."""
    lane: Lane = Lane.BULK
    """The lane of `key`; a field, because every stage asks for it."""
    shard: int = 0
    """Index of the shard that the job came from, which gets its answer or has it back."""

    def __post_init__(self) -> None:
        self.lane = _LANES.get(self.key, self.lane)

    def fail(self, error: ErrorInfo) -> None:
        """End without tags; the status follows from the code."""
        self.error = error
        self.tags = self.embedding = self.vector = self.cache = None
        self.status = status_of(error.code)

    def expiry(self, now_s: float) -> ErrorInfo | None:
        """The error `expired` where the deadline has passed, or None."""
        if self.expires_s is None or now_s < self.expires_s:
            return None
        return ErrorInfo(
            code=ErrorCode.EXPIRED,
            message=f"the deadline passed {now_s - self.expires_s:.3f} s before the picture was encoded",
            stage=Stage.BATCH if self.slot >= 0 else Stage.CLAIM,
        )

    @property
    def log_id(self) -> str:
        """The id under which the caller looks for the answer."""
        return self.answer_id or self.id

    def answer(self, *, worker: str, until_s: float, answered_at: datetime | None = None) -> Answer:
        """The terminal record of the job, with the time of every stage so far."""
        warnings = self.warnings
        if self.labels is not None and self.labels.warnings and self.status is Status.TAGGED:
            warnings += self.labels.warnings
        image = self.image
        if image is None and self.request is not None:
            image = ImageInfo(reference=without_query(self.request.image))
        request, label_set = self.request, self.label_set
        # By position: for keyword arguments msgspec compares the names, which takes a sixth of the time of this method.
        return Answer(
            self.answer_id or self.id,
            self.status,
            CONTRACT_VERSION,
            image,
            self.tags,
            self._labels_info(),
            self.model,
            self.moments.timing(until_s),
            self.batch_size,
            self.attempt,
            worker,
            self.lane,
            self.error,
            request.metadata if request is not None else None,
            self.embedding,
            warnings or None,
            answered_at,
            self.history or None,
            request.callback if request is not None else None,
            self.vector,
            self.cache,
            label_set.is_unknown(self.tags) or None if label_set is not None else None,
        )

    def _labels_info(self) -> LabelsInfo | None:
        if self.labels is not None:
            return self.labels.info
        return None if self.label_set is None else self.label_set.info

    def server_time(self, at_s: float) -> datetime:
        """A time of this machine's monotonic clock, converted to the clock of Redis by the claim of this job."""
        moments = self.moments
        if not moments.claimed_ms:
            return datetime.now(UTC)
        return moment(moments.claimed_ms + (at_s - moments.claimed_s) * 1000)


def _note_returns(job: Job, envelope: Envelope) -> None:
    """Divide the time from enqueue to claim into earlier attempts, pauses and countdown, and the wait in the lane."""
    moments, sent_ms = job.moments, envelope.sent_ms
    returned_ms = max(sent_ms or 0.0, envelope.eta_ms or 0.0, back_in_lane_ms(job.history))
    in_lane_ms = min(returned_ms, moments.claimed_ms)
    moments.queue_ms = round(moments.claimed_ms - in_lane_ms, 3)
    if sent_ms is not None and in_lane_ms > sent_ms:
        moments.earlier_ms = round(in_lane_ms - sent_ms, 3)


def open_job(claimed: Claimed, *, zone: tzinfo = UTC) -> Job:
    """Read a claimed message into a job. A message that breaks the contract gives a job with an error.

    Args:
        zone: time zone of an eta or expires that names none.
    """
    job = Job(
        id=claimed.id,
        key=claimed.key,
        attempt=claimed.attempt,
        deaths=claimed.deaths,
        generation=claimed.generation,
        raw=claimed.raw,
        moments=StageTimestamps(claimed_s=claimed.claimed_s, claimed_ms=claimed.claimed_ms),
        shard=claimed.shard,
    )
    if claimed.history:
        job.history = read_history(claimed.history)
    try:
        if claimed.id.startswith("~") and is_digest(claimed.id):
            job.answer_id = find_id(claimed.raw) or ""
        envelope = read_message(claimed.raw, zone=zone)
        job.ignore_result = envelope.ignore_result
        job.has_reply_to = envelope.has_reply_to
        if job.history or envelope.eta_ms is not None:
            _note_returns(job, envelope)
        elif envelope.sent_ms is not None:
            # Without `round`, which converts the number to text and back.
            job.moments.queue_ms = max(0, int((claimed.claimed_ms - envelope.sent_ms) * 1000 + 0.5)) / 1000
        job.has_callbacks = bool(envelope.canvas)
        job.warnings = field_warnings(envelope.fields)
        # The claim was read from both clocks, so it converts server times to local ones.
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
    except Exception as error:  # noqa: BLE001 border: a message that crashes its reader would end one worker after another
        text = f"expected a message that can be read, got one that fails with {type(error).__name__}"
        job.fail(ErrorInfo(code=ErrorCode.MALFORMED_MESSAGE, message=text, stage=Stage.CLAIM))
    return job
