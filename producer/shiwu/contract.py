"""The language both sides speak: request, answer, timing, error codes, lanes and key names.

Everything that crosses Redis is defined here and nowhere else. Readers ignore fields they do not know, so an old worker
can serve a new producer; fields are added, never renamed. The JSON Schema files in `docs/schema/` are generated from
these classes.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError, to_json

CONTRACT_VERSION: Final = 1
TASK_NAME: Final = "shiwu.tag"

MAX_IMAGE_CHARS: Final = 4096
MAX_INLINE_LABELS: Final = 1000
MAX_LABEL_CHARS: Final = 100
MAX_METADATA_BYTES: Final = 4096
MAX_TOP_K: Final = 1000
MAX_MESSAGE_BYTES: Final = 256 * 1024
ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$"
_ID = re.compile(ID_PATTERN)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Stage(StrEnum):
    """The seven words for the way of one job. They name files, timing fields and log keys alike."""

    CLAIM = "claim"
    FETCH = "fetch"
    DECODE = "decode"
    BATCH = "batch"
    ENCODE = "encode"
    SCORE = "score"
    COMMIT = "commit"


class Lane(StrEnum):
    """A Celery queue. Interactive goes first; bulk keeps a small guaranteed share."""

    INTERACTIVE = "interactive"
    BULK = "bulk"

    @property
    def queue(self) -> str:
        """The name of the Celery queue, which is also the Redis list of priority 0."""
        return f"shiwu.{self.value}"

    @property
    def keys(self) -> tuple[str, ...]:
        """The Redis lists that kombu spreads this queue over, most urgent first (priority steps 0, 3, 6, 9)."""
        return (self.queue, *(f"{self.queue}\x06\x16{step}" for step in (3, 6, 9)))


class Status(StrEnum):
    """How a job ended."""

    TAGGED = "tagged"
    REJECTED = "rejected"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class ErrorCode(StrEnum):
    """Stable reasons. A code is never renamed and never changes its meaning."""

    MALFORMED_MESSAGE = "malformed_message"  # the Celery message itself can't be read
    MESSAGE_TOO_LARGE = "message_too_large"  # over MAX_MESSAGE_BYTES, also after decompression
    UNKNOWN_TASK = "unknown_task"  # a message for another task lay in our lane
    UNSUPPORTED_CANVAS = "unsupported_canvas"  # a callback or canvas header that this version does not run
    INVALID_ID = "invalid_id"  # the job id is not a valid key
    INVALID_REQUEST = "invalid_request"  # a field has a wrong type or value
    INVALID_REFERENCE = "invalid_reference"  # `image` is no s3://, https://, http:// or file:// reference
    INVALID_LABELS = "invalid_labels"  # a word is empty, too long, repeated, or there are too many
    UNKNOWN_LABEL_SET = "unknown_label_set"  # no label set has this name
    METADATA_TOO_LARGE = "metadata_too_large"  # over MAX_METADATA_BYTES as JSON
    SOURCE_NOT_FOUND = "source_not_found"  # 404, no such key, no such file
    SOURCE_FORBIDDEN = "source_forbidden"  # 401, 403, or an address or folder the operator did not allow
    SOURCE_NOT_A_FILE = "source_not_a_file"  # a folder or a key prefix
    SOURCE_UNAVAILABLE = "source_unavailable"  # time-outs, 5xx, throttling, connection errors
    PICTURE_TOO_LARGE = "picture_too_large"  # over the limit in bytes, pixels or side
    PICTURE_EMPTY = "picture_empty"  # no bytes
    NOT_A_PICTURE = "not_a_picture"  # no allowed picture format begins like this
    PICTURE_BROKEN = "picture_broken"  # a picture by its head, but its pixels can't be decoded
    DECODER_CRASHED = "decoder_crashed"  # killed its loader, twice, alone
    DECODER_TIMEOUT = "decoder_timeout"  # fetch and decode exceeded the time limit, twice
    ENCODE_FAILED = "encode_failed"  # the model failed on this picture
    EXPIRED = "expired"  # the deadline passed before the picture was encoded
    CANCELLED = "cancelled"  # somebody who may do so cancelled the job
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # its workers died or gave it back too often
    QUEUE_FULL = "queue_full"  # told to producers only: the lane holds its limit already


class RequestError(ValueError):
    """A request breaks the contract. Carries the stable code; the text says what was expected and what came."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Wire(BaseModel):
    """What crosses the wire: immutable, and deaf to fields of a newer version."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON without the fields that are unset."""
        return to_json(self, exclude_none=True)


def _check_reference(image: str) -> str:
    if error := reference_error(image):
        raise PydanticCustomError("invalid_reference", "{reason}", {"reason": error})
    return image


def reference_error(image: str) -> str | None:
    """Why `image` is no usable reference, or None. Looks at the text only, never at the network."""
    if len(image) > MAX_IMAGE_CHARS:
        return f"expected at most {MAX_IMAGE_CHARS} characters, got {len(image)}"
    if _CONTROL.search(image):
        return "expected no control characters"
    try:
        parts = urlsplit(image)
        if parts.scheme == "s3":
            ok, expected = (
                bool(parts.netloc and parts.path.strip("/")),
                "s3://bucket/key with a bucket and a key",
            )
        elif parts.scheme in {"http", "https"}:
            if "@" in parts.netloc:
                return "expected a URL without user name and password"
            ok, expected = (
                bool(parts.hostname) and parts.port != 0,
                f"{parts.scheme}://host/path with a host name",
            )
        elif parts.scheme == "file":
            ok, expected = (
                parts.netloc in {"", "localhost"} and parts.path.startswith("/"),
                "file:///absolute/path",
            )
        else:
            ok, expected = False, "s3://bucket/key, https://host/path, http:// or file://"
    except ValueError as error:
        ok, expected = False, f"a URL ({error})"
    return None if ok else f"expected {expected}, got {without_query(image)[:200]!r}"


def without_query(image: str) -> str:
    """The reference fit for logs and answers: no query, no fragment, no user info (they may hold signatures)."""
    if not ("?" in image or "#" in image or "@" in image):
        return image
    try:
        parts = urlsplit(image)
    except ValueError:
        return image.partition("?")[0]
    netloc = parts.netloc.rpartition("@")[2]
    return parts._replace(query="", fragment="", netloc=netloc).geturl()


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) != len(labels):
        raise PydanticCustomError("invalid_labels", "expected every label once")
    return labels


def _check_metadata(metadata: JsonValue) -> JsonValue:
    size = len(to_json(metadata))
    if size > MAX_METADATA_BYTES:
        raise PydanticCustomError(
            "metadata_too_large",
            "expected at most {limit} bytes as JSON, got {size}",
            {"limit": MAX_METADATA_BYTES, "size": size},
        )
    return metadata


LabelSetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LABEL_CHARS, strip_whitespace=True)]
InlineLabels = Annotated[
    tuple[Label, ...], Field(min_length=1, max_length=MAX_INLINE_LABELS), AfterValidator(_check_labels)
]
Head = Literal["softmax", "sigmoid"]
Want = Literal["tags", "embedding"]


class Request(_Wire):
    """What a producer asks about one picture."""

    image: Annotated[str, AfterValidator(_check_reference)]
    labels: LabelSetName | InlineLabels | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 5
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    head: Head | None = None
    metadata: Annotated[JsonValue, AfterValidator(_check_metadata)] = None
    want: Annotated[tuple[Want, ...], Field(min_length=1, max_length=2)] = ("tags",)


REQUEST_FIELDS: Final = tuple(Request.model_fields)


def parse_request(fields: dict[str, Any]) -> Request:
    """Read the keyword arguments of a `shiwu.tag` message.

    Raises:
        RequestError: with the code of the first field that breaks the contract.
    """
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error) from None


def check_id(job_id: object) -> str:
    """Return the id if it is a valid key, or raise RequestError(invalid_id)."""
    if isinstance(job_id, str) and _ID.fullmatch(job_id):
        return job_id
    raise RequestError(
        ErrorCode.INVALID_ID,
        f"expected an id of 1 to 128 letters, digits or _ . : - that begins with a letter or digit, got {job_id!r:.80}",
    )


def _request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "request"
    message = f"{field}: {first['msg']}"
    if first["type"] in {"invalid_reference", "invalid_labels", "metadata_too_large"}:
        return RequestError(ErrorCode(first["type"]), message)
    if field == "labels":
        return RequestError(
            ErrorCode.INVALID_LABELS,
            f"labels: expected the name of a label set or 1 to {MAX_INLINE_LABELS} different words "
            f"of 1 to {MAX_LABEL_CHARS} characters ({first['msg']})",
        )
    if field == "image":
        return RequestError(ErrorCode.INVALID_REFERENCE, message)
    return RequestError(ErrorCode.INVALID_REQUEST, message)


class Tag(_Wire):
    """One label of an answer."""

    label: str
    score: float
    """Softmax or sigmoid of the scaled cosine; softmax is relative to the label set."""
    cosine: float
    """Cosine of picture and label vectors, comparable across label sets of one model."""


class Timing(_Wire):
    """Milliseconds of each stage; they follow each other without gaps and add up to `total`.

    `queue` is the wait in the lane and is absent when the sender did not say when it enqueued. `batch` is waiting and
    `encode` is the whole forward pass: neither is divided by the batch size. Commit lies after the answer.
    """

    queue: float | None = None
    claim: float = 0.0
    fetch: float = 0.0
    decode: float = 0.0
    batch: float = 0.0
    encode: float = 0.0
    score: float = 0.0
    total: float = 0.0


class ImageInfo(_Wire):
    """The picture as it was read. `reference` never has a query."""

    reference: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None


class LabelsInfo(_Wire):
    """Which labels were compared; the digest covers words, templates and head."""

    name: str | None = None
    digest: str
    count: int
    head: Head


class ModelInfo(_Wire):
    """Which weights answered, and how they were run."""

    id: str
    revision: str
    dtype: str
    device: str


class ErrorInfo(_Wire):
    """Why there are no tags."""

    code: ErrorCode
    message: str
    stage: Stage | None = None
    retryable: bool = False


class Answer(_Wire):
    """The one terminal result of a job."""

    version: int = CONTRACT_VERSION
    id: str
    status: Status
    image: ImageInfo | None = None
    tags: tuple[Tag, ...] | None = None
    labels: LabelsInfo | None = None
    model: ModelInfo | None = None
    timing: Timing = Timing()
    batch_size: int | None = None
    attempts: int = 1
    worker: str = ""
    lane: Lane | None = None
    error: ErrorInfo | None = None
    metadata: JsonValue = None
    embedding: tuple[float, ...] | None = None


RESULT_STREAM: Final = "shiwu:results"
CLAIMS: Final = "shiwu:claims"
"""Hash: job id → `token|attempt|lane key|message bytes` of every claimed job."""
LEASES: Final = "shiwu:leases"
"""Sorted set: job id → server time in ms at which its lease ends."""
ATTEMPTS: Final = "shiwu:attempts"
"""Hash: job id → attempts so far, for jobs that came back to their lane."""
DELAYED: Final = "shiwu:delayed"
"""Sorted set: job id → server time in ms at which the job returns to its lane."""
PARKED: Final = "shiwu:parked"
"""Hash: job id → `lane key|message bytes` of every delayed job."""
DEAD: Final = "shiwu:dead"
"""Stream of dead letters: raw message, reason, stage, attempts, worker."""
COUNTERS: Final = "shiwu:counters"
"""Hash: totals over all workers (answered, duplicates, reaped, …)."""
WORKERS: Final = "shiwu:workers"
"""Sorted set: worker name → server time in ms of its last sign of life."""


def result_key(job_id: str) -> str:
    """Where Celery looks for the result of a task, and the channel on which it is announced."""
    return f"celery-task-meta-{job_id}"


def done_key(job_id: str) -> str:
    """The mark of an answered id; it outlives the answer."""
    return f"shiwu:done:{job_id}"
