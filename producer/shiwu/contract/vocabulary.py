"""Stages, lanes, statuses, error codes and limits that producers and workers share."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

CONTRACT_VERSION: Final = 1
TASK_NAME: Final = "shiwu.tag"
SENT_HEADER: Final = "shiwu_sent_ms"
"""The message header with the time of enqueueing, in ms since 1970 by Redis' clock; `shiwu.Client` writes it."""
ANSWER_BY_HEADER: Final = "shiwu_answer_by_ms"
"""The message header with the time by which the job must have an answer, in ms since 1970 by Redis' clock. Any Celery
client may set it; `shiwu.Client` does so for `answer_by_s`."""

MAX_IMAGE_CHARS: Final = 4096
MAX_INLINE_LABELS: Final = 1000
MAX_LABEL_CHARS: Final = 100
MAX_METADATA_BYTES: Final = 4096
MAX_TOP_K: Final = 1000
MAX_CALLBACK_CHARS: Final = 2048
"""Of a URL; the name of an endpoint has 1 to 64 characters."""
MAX_MESSAGE_BYTES: Final = 256 * 1024


class Stage(StrEnum):
    """The seven stages of a job, in order. Files, timing fields and log keys have the same names."""

    CLAIM = "claim"
    FETCH = "fetch"
    DECODE = "decode"
    BATCH = "batch"
    ENCODE = "encode"
    SCORE = "score"
    COMMIT = "commit"


class Lane(StrEnum):
    """One of the two Celery queues. `interactive` has priority; `bulk` keeps a small guaranteed share."""

    INTERACTIVE = "interactive"
    BULK = "bulk"

    @property
    def queue(self) -> str:
        """The name of the Celery queue, which is also the name of its Redis list for priority 0."""
        return f"shiwu.{self.value}"

    @property
    def keys(self) -> tuple[str, ...]:
        """The Redis lists of this queue, most urgent first: one for each of kombu's priority steps 0, 3, 6 and 9."""
        return (self.queue, *(f"{self.queue}\x06\x16{step}" for step in (3, 6, 9)))


class Status(StrEnum):
    """How a job ended."""

    TAGGED = "tagged"
    REJECTED = "rejected"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class ErrorCode(StrEnum):
    """Why a job has no tags. A code is never renamed and never changes its meaning; see docs/errors.md."""

    MALFORMED_MESSAGE = "malformed_message"  # the Celery message itself cannot be read
    MESSAGE_TOO_LARGE = "message_too_large"  # over MAX_MESSAGE_BYTES, also after decompression
    UNKNOWN_TASK = "unknown_task"  # a message for another task was in a shiwu lane
    UNSUPPORTED_CANVAS = "unsupported_canvas"  # callbacks of a kind that is not sent, too many, or too deep
    CALLBACK_REFUSED = "callback_refused"  # a callback names a task or a queue that the operator did not allow
    INVALID_ID = "invalid_id"  # the job id is longer than MAX_ID_BYTES, or has the form of a digest
    INVALID_REQUEST = "invalid_request"  # a field has a wrong type or value
    INVALID_REFERENCE = "invalid_reference"  # `image` is not an s3://, https://, http:// or file:// reference
    LABELS_TOO_COSTLY = "labels_too_costly"  # new labels of the request would take the device too long
    INVALID_LABELS = "invalid_labels"  # a label is empty, too long or repeated, or there are too many
    UNKNOWN_LABEL_SET = "unknown_label_set"  # no label set has this name
    METADATA_TOO_LARGE = "metadata_too_large"  # over MAX_METADATA_BYTES as JSON
    SOURCE_NOT_FOUND = "source_not_found"  # 404, no such key, no such file
    SOURCE_FORBIDDEN = "source_forbidden"  # 401, 403, or a bucket or folder the operator did not allow
    SOURCE_NOT_A_FILE = "source_not_a_file"  # a folder or a key prefix
    SOURCE_UNAVAILABLE = "source_unavailable"  # time-outs, 5xx, no connection, or none allowed
    SOURCE_THROTTLED = "source_throttled"  # the source asks for fewer requests (429, 503 SlowDown)
    SOURCE_ARCHIVED = "source_archived"  # the object is in an archive and must be restored before it can be read
    SOURCE_CREDENTIALS = "source_credentials"  # the store refuses the worker's credentials or settings
    SOURCE_CLOCK_SKEW = "source_clock_skew"  # the store reports that the worker's clock is wrong
    SOURCE_ERROR = "source_error"  # a reply or an error of the source that the worker does not know
    PICTURE_TOO_LARGE = "picture_too_large"  # over a limit: bytes, pixels, side, frames, scans, memory
    PICTURE_EMPTY = "picture_empty"  # no bytes
    NOT_A_PICTURE = "not_a_picture"  # no image format begins like this
    PICTURE_UNSUPPORTED = "picture_unsupported"  # a known image format, or a variant of one, that is not accepted
    PICTURE_INVISIBLE = "picture_invisible"  # every pixel is transparent
    PICTURE_BROKEN = "picture_broken"  # the bytes begin like an image, but the pixels cannot be decoded
    DECODER_CRASHED = "decoder_crashed"  # the image crashed its loader twice, the second time alone
    DECODER_TIMEOUT = "decoder_timeout"  # took too much CPU, or exceeded the time limit twice
    ENCODE_FAILED = "encode_failed"  # the model failed on this image
    OUT_OF_MEMORY = "out_of_memory"  # the device has no memory for this image, even alone
    EXPIRED = "expired"  # the deadline passed before the image was encoded
    CANCELLED = "cancelled"  # a client, or Celery's revoke, cancelled the job
    INTERNAL_ERROR = "internal_error"  # an error that the worker does not know; says nothing about the image
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # its workers crashed or released it too often
    CHAIN_FAILED = "chain_failed"  # only clients: an earlier job of its Celery chain ended without tags
    ALREADY_ANSWERED = "already_answered"  # the id was answered before, and the answer is no longer kept
    QUEUE_FULL = "queue_full"  # only clients: the lane already holds its limit
    ANSWER_UNREADABLE = "answer_unreadable"  # only clients: the stored result is not an answer that they can read


class AttemptEnd(StrEnum):
    """How an earlier attempt of a job ended if not by an error of the job."""

    WORKER_LOST = "worker_lost"  # its worker crashed, hung or lost its device
    WORKER_STOPPED = "worker_stopped"  # its worker was stopped and released the job


class WarningCode(StrEnum):
    """Why the tags of an answer need care. A code is never renamed and never changes its meaning."""

    UNKNOWN_FIELD = "unknown_field"  # the message has a field that this worker does not know
    LABELS_UNREADABLE = "labels_unreadable"  # the model's tokenizer knows no part of these labels
    LABELS_ALIKE = "labels_alike"  # the model gives these labels the same vector
    SINGLE_LABEL = "single_label"  # softmax over one label is always 1
    CALIBRATION_STALE = "calibration_stale"  # the limits of the label set were chosen for another model
    TAGS_CUT = "tags_cut"  # the last tags are left out, because the answer would be too large


class Cache(StrEnum):
    """Whose work gave the vector of an image that this job did not encode itself."""

    JOINED = "joined"  # another job with the same image was in flight
    VECTOR = "vector"  # the worker kept the vector of an earlier job with the same image


def known_word(kind: type[StrEnum], word: str) -> str:
    """The member of `kind` with this value, or the word itself where there is none, as a newer version may write."""
    members: dict[Any, Any] = kind._value2member_map_
    found: str = members.get(word, word)
    return found


def as_utf8(text: str) -> str:
    """The text with lone surrogates escaped: file names may contain them, and JSON in UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class RequestError(ValueError):
    """An argument or a request field is invalid; nothing was sent. `code` is stable.

    The text says what was expected and what came.
    """

    item: int | None = None
    """The index of the invalid image in its portion, where several are sent."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class RequestModel(BaseModel):
    """Base of what producers send: immutable. Unknown fields of newer versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON without the fields that are unset."""
        return to_json(self, exclude_none=True)
