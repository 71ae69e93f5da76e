"""What each error code means: status of the answer, fault, whether the worker retries, and what to do.

`CODES` has one row for every `ErrorCode`. `docs/errors.md` is generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from shiwu.contract.vocabulary import ErrorCode, Status

LogLevel = Literal["info", "warning", "error"]


class Fault(StrEnum):
    """What has to change before the job can succeed."""

    REQUEST = "request"  # the message, its fields or its reference
    IMAGE = "image"  # the bytes of the image
    SOURCE = "source"  # the store or web server that holds the image
    SERVICE = "service"  # the worker, its settings, or something that it depends on
    CALLER = "caller"  # nothing failed: the caller cancelled the job or set its deadline


class Retry(StrEnum):
    """Whether a worker tries a job with this error again."""

    NEVER = "never"  # another attempt gives the same error
    IF_SET = "if SHIWU_RETRY names it"
    DEFAULT = "yes"  # up to SHIWU_MAX_ATTEMPTS, or as SHIWU_RETRY sets it


@dataclass(frozen=True, slots=True)
class CodeInfo:
    """The meaning of one error code."""

    status: Status | None
    """Status of the answer; None for a code that only a client raises."""
    fault: Fault
    retry: Retry
    meaning: str
    remedy: str
    """What the caller or the operator can do."""
    log_level: LogLevel = "info"
    """Level of the worker's log line about one such job."""


def _rejected(fault: Fault, meaning: str, remedy: str) -> CodeInfo:
    return CodeInfo(Status.REJECTED, fault, Retry.NEVER, meaning, remedy)


def _failed(
    meaning: str, remedy: str, *, retry: Retry, fault: Fault = Fault.SERVICE, log_level: LogLevel = "info"
) -> CodeInfo:
    return CodeInfo(Status.FAILED, fault, retry, meaning, remedy, log_level)


CODES: Final[Mapping[ErrorCode, CodeInfo]] = MappingProxyType(
    {
        # ---------------------------------------------------------------------------- the request
        ErrorCode.MALFORMED_MESSAGE: _rejected(
            Fault.REQUEST,
            "The Celery message cannot be read.",
            "Send it with `shiwu.Client` or a Celery client, as JSON.",
        ),
        ErrorCode.MESSAGE_TOO_LARGE: _rejected(
            Fault.REQUEST,
            "The message is larger than 256 KiB, packed or unpacked, or grows more than 32 times when it is unpacked.",
            "Send fewer inline labels and less metadata; name a label set instead.",
        ),
        ErrorCode.UNKNOWN_TASK: _rejected(
            Fault.REQUEST,
            "A message for another task is in a shiwu lane.",
            "Route only `shiwu.tag` to the queues `shiwu.interactive` and `shiwu.bulk`.",
        ),
        ErrorCode.UNSUPPORTED_CANVAS: _rejected(
            Fault.REQUEST,
            "The message has callbacks of a kind that is not sent, too many of them, or too deep ones.",
            "Send fewer or flatter callbacks, or raise `SHIWU_CALLBACK_MOST`.",
        ),
        ErrorCode.CALLBACK_REFUSED: _rejected(
            Fault.REQUEST,
            "A callback names a task or a queue that the operator does not allow.",
            "Add the task to `SHIWU_CALLBACK_TASKS` and the queue to `SHIWU_CALLBACK_QUEUES`.",
        ),
        ErrorCode.INVALID_ID: _rejected(
            Fault.REQUEST,
            "The job id has more than 255 bytes, or the form of a digest.",
            "Send a shorter id, or let the client choose it.",
        ),
        ErrorCode.INVALID_REQUEST: _rejected(
            Fault.REQUEST,
            "A field of the request has a wrong type or value.",
            "Correct the field that the message names.",
        ),
        ErrorCode.INVALID_REFERENCE: _rejected(
            Fault.REQUEST,
            "`image` is not a reference that can be asked for: s3://bucket/key, https://, http:// or file://.",
            "Correct the reference.",
        ),
        ErrorCode.INVALID_LABELS: _rejected(
            Fault.REQUEST,
            "A label is empty, too long or repeated, has a control character, or there are too many labels.",
            "Correct the labels, or name a label set.",
        ),
        ErrorCode.LABELS_TOO_COSTLY: _rejected(
            Fault.REQUEST,
            "The new labels of the request would take the worker's device longer than it allows one request.",
            "Send fewer or shorter labels, deploy them as a label set, or raise `SHIWU_LABEL_COST_S`.",
        ),
        ErrorCode.UNKNOWN_LABEL_SET: CodeInfo(
            Status.REJECTED,
            Fault.REQUEST,
            Retry.DEFAULT,  # while label sets are rolled out, another worker may have it
            "The workers that claimed the job, up to four times, have no label set with this name.",
            "Deploy the label set (`SHIWU_LABELS_DIR`) before its producers, or correct the name.",
        ),
        ErrorCode.METADATA_TOO_LARGE: _rejected(
            Fault.REQUEST, "`metadata` is larger than 4 KiB as JSON.", "Send a key to the metadata instead."
        ),
        # ---------------------------------------------------------------------------- the source
        ErrorCode.SOURCE_NOT_FOUND: _rejected(
            Fault.SOURCE,
            "The source says that the image does not exist (404, 410, no such key, bucket, version or file).",
            "Correct the reference, or upload the image before the job is enqueued.",
        ),
        ErrorCode.SOURCE_FORBIDDEN: _rejected(
            Fault.SOURCE,
            "The source refuses access (401, 403), or the operator does not allow this bucket, folder or address.",
            "Give the worker's role the right to read the object, sign the URL again, or extend `SHIWU_ALLOW_…`.",
        ),
        ErrorCode.SOURCE_NOT_A_FILE: _rejected(
            Fault.REQUEST, "The reference names a folder or a key prefix.", "Name one file or one object."
        ),
        ErrorCode.SOURCE_ARCHIVED: _rejected(
            Fault.SOURCE,
            "The object is in an archive storage class and must be restored before it can be read.",
            "Restore the object, then requeue the dead letter.",
        ),
        ErrorCode.SOURCE_UNAVAILABLE: _failed(
            "The source did not answer in time, answered 5xx, or no connection to it was possible or allowed.",
            "Look at the source and the network; requeue the dead letters afterwards.",
            fault=Fault.SOURCE,
            retry=Retry.DEFAULT,
        ),
        ErrorCode.SOURCE_THROTTLED: _failed(
            "The source asks for fewer requests (429, SlowDown). Its Retry-After is honoured.",
            "Run fewer workers or loader threads for this source, or raise its limit; requeue the dead letters.",
            fault=Fault.SOURCE,
            retry=Retry.DEFAULT,
        ),
        ErrorCode.SOURCE_CREDENTIALS: _failed(
            "The store refuses the worker's own credentials, region or endpoint, or the worker has no credentials.",
            "Correct the worker's credentials and S3 settings, run `shiwu-worker --check`, requeue the dead letters.",
            retry=Retry.DEFAULT,
            log_level="warning",
        ),
        ErrorCode.SOURCE_CLOCK_SKEW: _failed(
            "The store says that the time of the worker's machine differs too much from its own.",
            "Set the clock of the worker's machine (NTP), then requeue the dead letters.",
            retry=Retry.DEFAULT,
            log_level="warning",
        ),
        ErrorCode.SOURCE_ERROR: _failed(
            "The source sent a reply, or the fetch met an error, that this worker does not know.",
            "Read the worker's log line `source_failed`, which has the cause; report it if shiwu should know it.",
            retry=Retry.DEFAULT,
            log_level="error",
        ),
        # ---------------------------------------------------------------------------- the image
        ErrorCode.PICTURE_TOO_LARGE: _rejected(
            Fault.IMAGE,
            "The image exceeds a limit: bytes, pixels, side, frames, scans or memory of its decoder.",
            "Send a smaller image, or raise the limit that the message names.",
        ),
        ErrorCode.PICTURE_EMPTY: _rejected(Fault.IMAGE, "The file has no bytes.", "Upload the image again."),
        ErrorCode.NOT_A_PICTURE: _rejected(
            Fault.IMAGE,
            "The bytes do not begin like an image, or they are packed (gzip, zstd, …).",
            "Check what the reference leads to: often an HTML page, or an object that was stored packed.",
        ),
        ErrorCode.PICTURE_UNSUPPORTED: _rejected(
            Fault.IMAGE,
            "The image has a format, or a variant of one, that this worker does not accept.",
            "Convert the image, or add its format to `SHIWU_FORMATS`; HEIC also needs the extra `shiwu[heic]`.",
        ),
        ErrorCode.PICTURE_INVISIBLE: _rejected(
            Fault.IMAGE, "Every pixel of the image is transparent.", "Send an image that shows something."
        ),
        ErrorCode.PICTURE_BROKEN: _rejected(
            Fault.IMAGE,
            "The bytes begin like an image, but its pixels cannot be decoded, or some are missing.",
            "Upload the image again.",
        ),
        ErrorCode.DECODER_CRASHED: _failed(
            "The image crashed its decoder process twice, the second time alone.",
            "Keep the image for analysis, then drop the dead letter.",
            fault=Fault.IMAGE,
            retry=Retry.IF_SET,
        ),
        ErrorCode.DECODER_TIMEOUT: _failed(
            "Decoding took more CPU time than allowed, or fetch and decode exceeded their time limit twice.",
            "Raise `SHIWU_DECODE_CPU_S` or `SHIWU_LOAD_TIMEOUT_S` for large images, or drop the dead letter.",
            fault=Fault.IMAGE,
            retry=Retry.IF_SET,
        ),
        # ---------------------------------------------------------------------------- the model and the service
        ErrorCode.ENCODE_FAILED: _failed(
            "The model failed on this image, also alone and in FP32.",
            "Read the worker's log; requeue after the model or the device is repaired.",
            retry=Retry.IF_SET,
        ),
        ErrorCode.OUT_OF_MEMORY: _failed(
            "The device has no memory for this image, even alone.",
            "Free memory on the device, or use a smaller model; requeue the dead letters.",
            retry=Retry.DEFAULT,
        ),
        ErrorCode.INTERNAL_ERROR: _failed(
            "The worker met an error that it does not know; the cause is not the image.",
            "Read the worker's log line `source_failed` or `batch_failed`, report it, requeue after an upgrade.",
            retry=Retry.DEFAULT,
            log_level="error",
        ),
        ErrorCode.ATTEMPTS_EXHAUSTED: _failed(
            "Workers crashed, hung or lost their device too often while they held the job.",
            "Read the logs of these workers, then requeue or drop the dead letter.",
            retry=Retry.NEVER,
        ),
        # ---------------------------------------------------------------------------- the caller
        ErrorCode.EXPIRED: CodeInfo(
            Status.EXPIRED,
            Fault.CALLER,
            Retry.NEVER,
            "The deadline of the job passed before the image was encoded.",
            "Add workers, or set a later deadline.",
        ),
        ErrorCode.CANCELLED: CodeInfo(
            Status.CANCELLED, Fault.CALLER, Retry.NEVER, "A client or Celery's revoke cancelled the job.", "Nothing."
        ),
        ErrorCode.CHAIN_FAILED: _failed(
            "A job before this one in its Celery chain ended without tags, so this job never ran.",
            "Read the error of that job, which the message quotes.",
            retry=Retry.NEVER,
            fault=Fault.CALLER,
        ),
        ErrorCode.ALREADY_ANSWERED: _rejected(
            Fault.REQUEST,
            "A job with this id was answered before, and its answer is no longer kept.",
            "Use a new id for every job.",
        ),
        ErrorCode.QUEUE_FULL: CodeInfo(
            None,
            Fault.SERVICE,
            Retry.NEVER,
            "The lane holds as many messages as the producer allows; nothing was enqueued.",
            "Enqueue later, or add workers.",
        ),
        ErrorCode.ANSWER_UNREADABLE: CodeInfo(
            None,
            Fault.SERVICE,
            Retry.NEVER,
            "The result stored under the id is not an answer that this version of the client can read.",
            "Upgrade the client, or check whether another task used the same id.",
        ),
    }
)


_WORDS: Final = frozenset(ErrorCode)


def _info_of(code: str) -> CodeInfo | None:
    return CODES.get(ErrorCode(code)) if code in _WORDS else None


def status_of(code: str) -> Status:
    """The status of an answer with this error; `failed`, the service's own fault, where the table has no row."""
    info = _info_of(code)
    return (info.status if info is not None else None) or Status.FAILED


def log_level_of(code: str) -> LogLevel:
    """The level of the worker's log line about a job with this error; `error` where the table has no row."""
    info = _info_of(code)
    return info.log_level if info is not None else "error"


RETRIABLE: Final = frozenset(code for code, info in CODES.items() if info.retry is not Retry.NEVER)
"""Errors that SHIWU_RETRY may name."""
RETRIED: Final = frozenset(code for code, info in CODES.items() if info.retry is Retry.DEFAULT)
"""Errors that a worker retries by default."""
