"""The frames between a worker and its loader processes: JSON, never pickle."""

from __future__ import annotations

import signal
import time
from typing import Final

import msgspec
from pydantic import BaseModel, ConfigDict

from shiwu.contract import ErrorCode, ErrorInfo, Lane, Stage
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import DecodeLimits, FetchLimits, S3Options, SandboxLimits
from shiwu_worker.stages.decode.image_spec import ImageSpec


class LoaderOptions(BaseModel):
    """What a loader process needs to know; its first frame."""

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


class LoadTask(msgspec.Struct, frozen=True):
    """One image to load into one slot."""

    ticket: int
    slot: int
    image: str
    lane: Lane = Lane.INTERACTIVE
    source: str = ""
    """Host, bucket or kind of the source, without path and query; sources share the loader threads."""


class LoadResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of a task. Times are seconds of the monotonic clock, which all processes of a machine share."""

    ticket: int
    slot: int
    started_s: float
    fetched_s: float
    decoded_s: float
    n_bytes: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    error: ErrorInfo | None = None
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


ENCODER: Final = msgspec.json.Encoder()
LOADED: Final = msgspec.json.Decoder(LoadResult)
LOAD_TASK: Final = msgspec.json.Decoder(LoadTask)
READY: Final = b"ready"
READY_UNFILTERED: Final = b"ready without a filter of system calls: "
"""Begins the ready frame of a loader whose sandbox has no system-call filter; the reason follows."""
ENVIRONMENT: Final = msgspec.json.Decoder(dict[str, str])
"""Decodes a loader's second frame: variables that its sources need and its sandbox must not see."""


def refused_result(task: LoadTask, pause_s: float) -> LoadResult:
    """The result of an image that was not fetched, because others wait already for its source, which is slow."""
    now_s = time.monotonic()
    text = "not asked: the source was slow lately, and other images wait for it"
    error = ErrorInfo(code=ErrorCode.SOURCE_UNAVAILABLE, message=text, stage=Stage.FETCH, retryable=True)
    return LoadResult(
        ticket=task.ticket,
        slot=task.slot,
        started_s=now_s,
        fetched_s=now_s,
        decoded_s=now_s,
        error=error,
        retry_after_s=pause_s,
        is_untried=True,
    )


def failed_twice_result(task: LoadTask, code: ErrorCode, sent_s: float, status: int) -> LoadResult:
    """The result of an image that ended its loader, or was too slow, a second time and alone."""
    now_s = time.monotonic()
    if code is ErrorCode.DECODER_TIMEOUT:
        text = "the image exceeded the time limit of fetch and decode twice, the second time alone"
    else:
        name = signal.Signals(-status).name if status < 0 else f"exit {status}"
        text = f"the image ended its loader twice, the second time alone ({name})"
    error = ErrorInfo(code=code, message=text, stage=Stage.DECODE)
    return LoadResult(
        ticket=task.ticket, slot=task.slot, started_s=sent_s, fetched_s=sent_s, decoded_s=now_s, error=error
    )
