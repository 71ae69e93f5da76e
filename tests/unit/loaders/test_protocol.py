"""The frames between worker, loader and sandbox: one result or one error, and only what its sender may say."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.loaders import protocol, sandbox_protocol
from shiwu_worker.loaders.protocol import (
    Loaded,
    LoadFailed,
    LoadTask,
    ProtocolError,
    Recognised,
    check_result,
    read_loader_frame,
)
from shiwu_worker.loaders.sandbox_protocol import DecoderFailed, Refused
from shiwu_worker.stages.fetch.validators import Validator
from tests.support.loader_options import LOADER_OPTIONS

TASK = LoadTask(ticket=5, slot=2, image="https://h/p")
LOADED = Loaded(5, 2, 2.0, 3.0, 4.0, n_bytes=9, format="PNG", width=3, height=4, sha256="0" * 64)
RECOGNISED = Recognised(5, 2, 2.0, 3.0, 4.0, n_bytes=9, sha256="0" * 64)
VALIDATOR = Validator('"1"', "a" * 32)
ERROR = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="no such key", stage=Stage.FETCH)
FAILED = LoadFailed(5, 2, 2.0, 3.0, 4.0, error=ERROR)


def check(result: protocol.LoadResult, *, task: LoadTask = TASK, known_images: int = 1) -> None:
    """Check a result of a task that was sent at 1 s; now it is 5 s."""
    options = LOADER_OPTIONS.model_copy(update={"known_images": known_images})
    check_result(result, task, sent_s=1.0, now_s=5.0, options=options)


def test_file_that_is_not_modified_is_the_one_of_the_task() -> None:
    """The loader has no bytes of it, and repeats the hash that the worker knows."""
    task = msgspec.structs.replace(TASK, validator=VALIDATOR, sha256="0" * 64)
    check(msgspec.structs.replace(RECOGNISED, n_bytes=None), task=task)
    check(msgspec.structs.replace(LOADED, validator=VALIDATOR))
    assert protocol.LOAD_TASK.decode(protocol.ENCODER.encode(task)) == task


def test_results_come_back_as_they_were_sent() -> None:
    """All types, and the frames that are no result."""
    for result in (LOADED, RECOGNISED, FAILED):
        assert read_loader_frame(protocol.ENCODER.encode(result)) == result
        check(result)
    for frame in (protocol.Ready(), protocol.Ready("no filter"), protocol.SandboxFault("two replies")):
        assert read_loader_frame(protocol.ENCODER.encode(frame)) == frame


@pytest.mark.parametrize(
    ("changes", "task", "known_images"),
    [
        pytest.param({"sha256": "0" * 63}, TASK, 1, id="no digest"),
        pytest.param({"n_bytes": 0}, TASK, 1, id="no bytes"),
        pytest.param({}, msgspec.structs.replace(TASK, has_to_be_decoded=True), 1, id="pixels are needed"),
        pytest.param({}, TASK, 0, id="nothing is known"),
        pytest.param({"n_bytes": None}, TASK, 1, id="no validator was sent"),
        pytest.param(
            {"n_bytes": None},
            msgspec.structs.replace(TASK, validator=VALIDATOR, sha256="1" * 64),
            1,
            id="another file was known",
        ),
        pytest.param({"validator": Validator('W/"1"', "a" * 32)}, TASK, 1, id="weak validator"),
        pytest.param({"validator": Validator('"1"', "https://h/p")}, TASK, 1, id="place with a URL"),
    ],
)
def test_recognised_image_is_believed_only_if_it_may_be_known(
    changes: dict[str, Any], task: LoadTask, known_images: int
) -> None:
    """Otherwise a loader could let a job wait for pixels that it never gets."""
    with pytest.raises(ProtocolError):
        check(msgspec.structs.replace(RECOGNISED, **changes), task=task, known_images=known_images)


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": 3},
        {"ticket": 6},
        {"started_s": 0.9},
        {"fetched_s": 1.5},
        {"decoded_s": 5.1},
        {"started_s": math.nan},
        {"n_bytes": 0},
        {"n_bytes": 1001},
        {"format": "HEIF"},
        {"width": 0},
        {"height": -4},
        {"width": 16_385, "height": 1},
        {"width": 1001, "height": 1000},
        {"sha256": ""},
        {"sha256": "0" * 63 + "G"},
        {"sha256": "0" * 64 + "\n"},
    ],
)
def test_image_outside_the_limits_is_not_believed(changes: dict[str, Any]) -> None:
    """Another slot, times out of order, and facts that the limits exclude."""
    with pytest.raises(ProtocolError, match=r"^expected "):
        check(msgspec.structs.replace(LOADED, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": 3},
        {"error": msgspec.structs.replace(ERROR, code="expired")},
        {"error": msgspec.structs.replace(ERROR, code="no_such_code")},
        {"error": msgspec.structs.replace(ERROR, code=ErrorCode.DECODER_CRASHED)},
        {"error": msgspec.structs.replace(ERROR, stage=Stage.ENCODE)},
        {"error": msgspec.structs.replace(ERROR, stage=None)},
        {"error": msgspec.structs.replace(ERROR, message="x" * 4001)},
        {"detail": "x" * 4001},
        {"n_bytes": -1},
        {"retry_after_s": -1.0},
        {"retry_after_s": math.inf},
        {"retry_after_s": math.nan},
    ],
)
def test_error_that_no_loader_has_is_not_believed(changes: dict[str, Any]) -> None:
    """Codes and stages other than those of fetch and decode, long texts, and pauses without an end."""
    with pytest.raises(ProtocolError, match=r"^expected "):
        check(msgspec.structs.replace(FAILED, **changes))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{}",
        b"ready",
        b"[" * 10_000,
        b'{"type":"loaded","ticket":5,"slot":2,"started_s":2,"fetched_s":3,"decoded_s":4}',
        b'{"type":"failed","ticket":5,"slot":2,"started_s":2,"fetched_s":3,"decoded_s":4}',
        protocol.ENCODER.encode(msgspec.to_builtins(LOADED) | {"error": msgspec.to_builtins(ERROR)}),
        protocol.ENCODER.encode(msgspec.to_builtins(FAILED) | {"width": 3}),
    ],
)
def test_frame_without_exactly_one_outcome_is_refused(frame: bytes) -> None:
    """Neither result nor error, or both."""
    with pytest.raises(ProtocolError, match=r"^expected a frame"):
        read_loader_frame(frame)


def test_sandbox_sends_only_texts_that_are_accepted() -> None:
    """Texts of decoders may quote an image's bytes; the sandbox cuts and escapes them."""
    text = "\x1b[2J\u202e\ud800" + "茶" * 2000
    frame = sandbox_protocol.encoded(DecoderFailed(1, sandbox_protocol.sent_text(text)))
    reply = sandbox_protocol.read_reply(frame, request=1, limits=LOADER_OPTIONS.decode)
    assert isinstance(reply, DecoderFailed)
    assert reply.message.startswith("\\u001b[2J\\u202e\\ud800茶")
    assert len(reply.message) == sandbox_protocol.MAX_TEXT
    assert len(frame) < sandbox_protocol.MAX_FRAME_BYTES


def test_rejections_of_a_decoder_have_its_codes_only() -> None:
    """Another code is a defect of the decoder."""
    broken = sandbox_protocol.refused(1, Rejected(ErrorCode.PICTURE_BROKEN, "cut"))
    assert broken == Refused(1, "picture_broken", "cut")
    assert isinstance(sandbox_protocol.refused(1, Rejected(ErrorCode.SOURCE_NOT_FOUND, "gone")), DecoderFailed)


@pytest.mark.parametrize(
    ("result", "changes"),
    [
        (LOADED, {"n_bytes": 1}),
        (LOADED, {"n_bytes": LOADER_OPTIONS.fetch.max_bytes}),
        (LOADED, {"width": 1, "height": 1}),
        (LOADED, {"width": LOADER_OPTIONS.decode.max_side, "height": 1}),
        (LOADED, {"width": 1000, "height": LOADER_OPTIONS.decode.max_pixels // 1000}),
        (LOADED, {"started_s": 1.0, "fetched_s": 1.0, "decoded_s": 1.0}),
        (LOADED, {"started_s": 5.0, "fetched_s": 5.0, "decoded_s": 5.0}),
        (FAILED, {"n_bytes": 0}),
        (FAILED, {"n_bytes": LOADER_OPTIONS.fetch.max_bytes}),
        (FAILED, {"retry_after_s": 0.0}),
        (FAILED, {"retry_after_s": 1e300}),
        (FAILED, {"detail": "x" * protocol.MAX_TEXT}),
    ],
)
def test_result_at_its_limits_is_believed(result: protocol.LoadResult, changes: dict[str, Any]) -> None:
    """The bounds belong to what a loader may say."""
    check(msgspec.structs.replace(result, **changes))


def test_text_of_a_frame_is_cut_to_its_limit() -> None:
    """One of just that length is whole."""
    whole = "x" * protocol.MAX_TEXT
    assert protocol.cut_text(whole) == whole
    assert protocol.cut_text(whole + "x") == "x" * (protocol.MAX_TEXT - 1) + "…"
