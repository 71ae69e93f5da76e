"""The frames between a worker and its loader processes: JSON, never pickle.

A loader gets three frames at its start: `SandboxOptions`, `LoaderOptions` and an environment. They have lengths, so it
reads none before its time. Then it gets tasks and sends `LoaderFrame`s through `channel.FrameChannel`. The pool checks
these: a loader reads what untrusted servers send.
"""

from __future__ import annotations

import math
import re
import signal
import time
from typing import Final, TypeAlias

import msgspec
from pydantic import BaseModel, ConfigDict

from shiwu.contract import ErrorCode, ErrorInfo, Lane, Stage
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import DecodeLimits, FetchLimits, S3Options, SandboxLimits
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.stages.fetch.validators import Validator


class SandboxOptions(BaseModel):
    """What the sandbox needs to know. It is all that a loader knows when its sandbox is forked: none is a secret."""

    model_config = ConfigDict(frozen=True)

    spec: ImageSpec
    threads: int
    """Images that are decoded at a time."""
    max_bytes: int
    """Size of the largest file."""
    decode: DecodeLimits
    is_exact: bool
    sandbox: SandboxLimits


class LoaderOptions(BaseModel):
    """What a loader process needs to know. It may hold secrets, such as the password of a proxy."""

    model_config = ConfigDict(frozen=True)

    spec: ImageSpec
    slots: int
    threads: int
    """Images that one loader fetches and decodes at a time."""
    access: AccessRules
    fetch: FetchLimits
    s3: S3Options
    user_agent: str = "shiwu"
    """User-Agent of requests to web servers."""
    decode: DecodeLimits
    is_exact: bool = False
    """Never decode a JPEG at reduced size."""
    sandbox: SandboxLimits
    known_images: int = 0
    """Most images that the worker knows at a time and that loaders need not decode; 0: they decode all."""

    @property
    def for_sandbox(self) -> SandboxOptions:
        """The part that the sandbox may know."""
        return SandboxOptions(
            spec=self.spec,
            threads=self.threads,
            max_bytes=self.fetch.max_bytes,
            decode=self.decode,
            is_exact=self.is_exact,
            sandbox=self.sandbox,
        )


class LoadTask(msgspec.Struct, frozen=True, gc=False):
    """One image to load into one slot."""

    ticket: int
    slot: int
    image: str
    lane: Lane = Lane.INTERACTIVE
    source: str = ""
    """Host, bucket or kind of the source, without path and query; sources share the loader threads."""
    has_to_be_decoded: bool = False
    """Whether the pixels are needed although the worker may know the image."""
    validator: Validator | None = None
    """What an earlier fetch of the same reference gave; the source is asked whether it still holds."""
    sha256: str = ""
    """Hash of the file that had this validator."""


class _Result(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The common fields. Times are seconds of the monotonic clock, which all processes of a machine share."""

    ticket: int
    slot: int
    started_s: float
    fetched_s: float
    decoded_s: float


class Loaded(_Result, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True, tag="loaded"):
    """The pixels of the image are in its slot. `sha256` is the hash of its file."""

    n_bytes: int
    format: str
    width: int
    height: int
    sha256: str
    validator: Validator | None = None


class Recognised(_Result, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True, tag="recognised"):
    """The image was not decoded, because the worker seems to know it. The slot must not be read."""

    sha256: str
    n_bytes: int | None = None
    """Size of the file; None if it was not fetched, because the source says that the task's validator still holds."""
    validator: Validator | None = None


class LoadFailed(_Result, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True, tag="failed"):
    """The image was not fetched or not decoded; its slot must not be read."""

    error: ErrorInfo
    n_bytes: int | None = None
    """None if it was not fetched."""
    detail: str | None = None
    """A text about the error for the log only."""
    is_final: bool = False
    """Whether the job must not be retried, whatever the error code says."""
    retry_after_s: float | None = None
    """The pause that the source asks for."""
    is_untried: bool = False
    """Whether no request was sent to the source, so that this counts as no attempt."""
    is_short_of_memory: bool = False
    """Whether memory was short; the image is retried alone."""


LoadResult: TypeAlias = Loaded | Recognised | LoadFailed


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """The first frame of a loader."""

    unfiltered_reason: str | None = None
    """Why its sandbox has no filter of system calls although there should be one."""


class SandboxFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sandbox_fault"):
    """The sandbox broke the protocol; the loader ends."""

    reason: str


LoaderFrame: TypeAlias = Ready | LoadResult | SandboxFault
ENCODER: Final = msgspec.json.Encoder()
_LOADER_FRAME: Final = msgspec.json.Decoder(LoaderFrame)
LOAD_TASK: Final = msgspec.json.Decoder(LoadTask)
MAX_FRAME_BYTES: Final = 1 << 20
"""Size of a task or of a loader's frame."""
MAX_OPTIONS_BYTES: Final = 16 << 20
MAX_TEXT: Final = 4000
"""Characters of a text in a frame."""
ENVIRONMENT: Final = msgspec.json.Decoder(dict[str, str])
"""Decodes a loader's third frame: variables that its sources need and its sandbox must not see."""
_SHA256: Final = re.compile("[0-9a-f]{64}")
_LOADING_CODES: Final = frozenset(code for code in ErrorCode if code.startswith(("source_", "picture_"))) | {
    ErrorCode.INVALID_REFERENCE,
    ErrorCode.NOT_A_PICTURE,
    ErrorCode.DECODER_TIMEOUT,
    ErrorCode.INTERNAL_ERROR,
}
"""What fetch and decode of one image may fail with. That a decoder crashed, only the pool can say."""


class ProtocolError(ValueError):
    """A frame that no loader may send. The text names the violation, and quotes nothing of the frame."""


def read_loader_frame(frame: bytes) -> LoaderFrame:
    """One frame of a loader. Whether a result is possible for its task says `check_result`.

    Raises:
        ProtocolError
    """
    try:
        read: LoaderFrame = _LOADER_FRAME.decode(frame)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"expected a frame with the fields of its type ({type(error).__name__})") from error
    return read


def check_result(result: LoadResult, task: LoadTask, *, sent_s: float, now_s: float, options: LoaderOptions) -> None:
    """Check every field of a result against what a loader may say of this task.

    Args:
        sent_s: when the task was sent, on the monotonic clock.

    Raises:
        ProtocolError
    """
    if (result.ticket, result.slot) != (task.ticket, task.slot):
        raise ProtocolError("expected the slot of the task, got another one")
    if not sent_s <= result.started_s <= result.fetched_s <= result.decoded_s <= now_s:
        raise ProtocolError("expected times in their order, between the task and now")
    match result:
        case Loaded():
            _check_image(result, options)
            _check_file(result.n_bytes, result, options)
        case Recognised(n_bytes=n_bytes):
            if task.has_to_be_decoded or not options.known_images:
                raise ProtocolError("expected the pixels of an image that must be decoded")
            if n_bytes is not None:
                _check_file(n_bytes, result, options)
            elif task.validator is None or result.sha256 != task.sha256:
                raise ProtocolError("expected the hash of the file that the task names")
        case LoadFailed():
            _check_failure(result, options)


def _check_image(result: Loaded, options: LoaderOptions) -> None:
    limits, longest, pixels = options.decode, max(result.width, result.height), result.width * result.height
    if min(result.width, result.height) < 1 or longest > limits.max_side or pixels > limits.max_pixels:
        raise ProtocolError("expected a size within the limits")
    if result.format not in limits.formats:
        raise ProtocolError("expected a format that the operator accepts")


def _check_file(n_bytes: int, result: Loaded | Recognised, options: LoaderOptions) -> None:
    if not 0 < n_bytes <= options.fetch.max_bytes:
        raise ProtocolError("expected a number of bytes within the limit")
    if not _SHA256.fullmatch(result.sha256):
        raise ProtocolError("expected a SHA-256 of 64 hexadecimal digits")
    if result.validator is not None and not result.validator.is_valid:
        raise ProtocolError("expected a strong ETag of usual length")


def _check_failure(result: LoadFailed, options: LoaderOptions) -> None:
    error = result.error
    if error.code not in _LOADING_CODES or error.stage not in {Stage.FETCH, Stage.DECODE}:
        raise ProtocolError("expected an error of fetch or decode")
    if max(len(error.message), len(result.detail or "")) > MAX_TEXT:
        raise ProtocolError(f"expected texts of at most {MAX_TEXT} characters")
    if result.n_bytes is not None and not 0 <= result.n_bytes <= options.fetch.max_bytes:
        raise ProtocolError("expected a number of bytes within the limit")
    if result.retry_after_s is not None and not 0 <= result.retry_after_s < math.inf:
        raise ProtocolError("expected a pause that ends")


def cut_text(text: str) -> str:
    """The text as a frame may have it."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def refused_result(task: LoadTask, pause_s: float) -> LoadFailed:
    """The result of an image that was not fetched, because others wait already for its source, which is slow."""
    now_s = time.monotonic()
    text = "not asked: the source was slow lately, and other images wait for it"
    error = ErrorInfo(code=ErrorCode.SOURCE_UNAVAILABLE, message=text, stage=Stage.FETCH, retryable=True)
    return LoadFailed(
        ticket=task.ticket,
        slot=task.slot,
        started_s=now_s,
        fetched_s=now_s,
        decoded_s=now_s,
        error=error,
        retry_after_s=pause_s,
        is_untried=True,
    )


def failed_twice_result(task: LoadTask, code: ErrorCode, sent_s: float, status: int) -> LoadFailed:
    """The result of an image that ended its loader, or was too slow, a second time and alone."""
    now_s = time.monotonic()
    if code is ErrorCode.DECODER_TIMEOUT:
        text = "the image exceeded the time limit of fetch and decode twice, the second time alone"
    else:
        name = signal.Signals(-status).name if status < 0 else f"exit {status}"
        text = f"the image ended its loader twice, the second time alone ({name})"
    error = ErrorInfo(code=code, message=text, stage=Stage.DECODE)
    return LoadFailed(
        ticket=task.ticket, slot=task.slot, started_s=sent_s, fetched_s=sent_s, decoded_s=now_s, error=error
    )
