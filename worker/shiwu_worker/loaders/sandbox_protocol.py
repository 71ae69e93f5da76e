"""The frames between a loader and its sandbox, and the checks with which the loader reads those of the sandbox.

A decoder that was taken over by an image may send anything. So a reply is one of four types, each field is checked
against what a decoder may say, and nothing that the loader can find out itself is sent: the format, the size of the
file, its hash, the stage, and whether the job is retried.
"""

from __future__ import annotations

import socket
import struct
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from shiwu.contract import as_utf8, printable
from shiwu_worker.errors import Rejected
from shiwu_worker.policy.limits import DecodeLimits

MAX_FRAME_BYTES: Final = 16 * 1024
MAX_TEXT: Final = 1000
"""Characters of a text in a frame. JSON needs six bytes for each at most."""
REQUEST: Final = struct.Struct("<QQ")
"""A request of the loader: its number on this thread, and the length of the file in the shared memory."""

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
RequestNumber = Annotated[int, msgspec.Meta(ge=1)]
Pixels = Annotated[int, msgspec.Meta(ge=1)]


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """The first frame of a thread of the sandbox."""

    thread: Annotated[int, msgspec.Meta(ge=1)]
    """The kernel's id of the thread, for its CPU clock."""
    unfiltered_reason: Text | None = None
    """Why there is no system-call filter although there should be one."""


class Decoded(msgspec.Struct, frozen=True, tag="decoded", forbid_unknown_fields=True):
    """The pixels are in the shared memory. Width and height are those of the upright image in full size."""

    request: RequestNumber
    width: Pixels
    height: Pixels


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """The image is not decoded, for a reason that lies in the image."""

    request: RequestNumber
    code: Literal["picture_unsupported", "picture_too_large", "picture_broken", "picture_invisible"]
    message: Text


class ShortOfMemory(msgspec.Struct, frozen=True, tag="short_of_memory", forbid_unknown_fields=True):
    """Memory was short, perhaps because of other images."""

    request: RequestNumber


class DecoderFailed(msgspec.Struct, frozen=True, tag="decoder_failed", forbid_unknown_fields=True):
    """The decoder has a defect; this says nothing about the image."""

    request: RequestNumber
    message: Text


Reply: TypeAlias = Decoded | Refused | ShortOfMemory | DecoderFailed
_REPLY: Final = msgspec.json.Decoder(Reply)
_HELLO: Final = msgspec.json.Decoder(Hello)
_ENCODER: Final = msgspec.json.Encoder()


class ProtocolError(ValueError):
    """A frame that the sandbox may not send. The text names the violation, and quotes nothing of the frame."""


class SandboxClosed(Exception):
    """The sandbox has closed its socket, which the end of its process does too."""


def receive(channel: socket.socket) -> bytes:
    """The next frame.

    Raises:
        SandboxClosed, ProtocolError, OSError
        TimeoutError: none has come within the time limit of the socket.
    """
    frame, _, flags, _ = channel.recvmsg(MAX_FRAME_BYTES)
    if flags & socket.MSG_TRUNC:
        raise ProtocolError(f"expected a frame of at most {MAX_FRAME_BYTES} bytes, got a longer one")
    if flags & socket.MSG_CTRUNC:
        raise ProtocolError("expected a frame without file descriptors, got some")
    if not frame:
        raise SandboxClosed
    return frame


def read_hello(frame: bytes) -> Hello:
    """The first frame of a thread.

    Raises:
        ProtocolError
    """
    try:
        hello = _HELLO.decode(frame)
    except ValueError as error:
        raise ProtocolError("expected the first frame of a thread, got another one") from error
    _check_text(hello.unfiltered_reason or "")
    return hello


def read_reply(frame: bytes, *, request: int, limits: DecodeLimits) -> Reply:
    """The reply to this request.

    Raises:
        ProtocolError: no decoder within these limits may send this.
    """
    try:
        reply: Reply = _REPLY.decode(frame)
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ProtocolError("expected one reply with the fields of its type, got another frame") from error
    except RecursionError as error:
        raise ProtocolError("expected one reply, got deeply nested JSON") from error
    if reply.request != request:
        raise ProtocolError("expected the reply to the last request, got one to another request")
    match reply:
        case Decoded(width=width, height=height):
            if width * height > limits.max_pixels or max(width, height) > limits.max_side:
                raise ProtocolError("expected a size within the limits, got a larger one")
        case Refused(message=message) | DecoderFailed(message=message):
            _check_text(message)
        case ShortOfMemory():
            pass
    return reply


def _check_text(text: str) -> None:
    if printable(text) != text:
        raise ProtocolError("expected a text of printable characters, got others")


def refused(request: int, error: Rejected) -> Reply:
    """The frame of a rejection; one with a code that no decoder may give is a defect."""
    try:
        return msgspec.convert(
            {"type": "refused", "request": request, "code": str(error.code), "message": sent_text(str(error))}, Refused
        )
    except msgspec.ValidationError:
        return DecoderFailed(request, sent_text(f"the decoder refused an image as {error.code}"))


def encoded(frame: Hello | Reply) -> bytes:
    """The frame as JSON."""
    return _ENCODER.encode(frame)


def sent_text(text: str) -> str:
    """The text as a frame may have it: cut, and with escapes for characters that are not printable."""
    return printable(as_utf8(text))[:MAX_TEXT]
