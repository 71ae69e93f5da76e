"""What is fuzzed: each target has inputs to begin with and a check that nothing but the promised errors comes out.

A target more is a `Target` more in `TARGETS`.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from shiwu.broker.message_ids import find_id
from shiwu.broker.message_reader import read_canvas, read_message
from shiwu.broker.message_writer import build_message
from shiwu.contract import CODES, ErrorCode, ErrorInfo, Fault, Lane, Request, RequestError, Stage, printable
from shiwu.contract.ids import check_id
from shiwu.contract.request import parse_request
from shiwu.watch.events import Ignored, ObjectStored, Unreadable
from shiwu.watch.formats import read_cloud_event
from shiwu.watch.formats import read_message as read_event
from shiwu_worker.errors import Rejected
from shiwu_worker.loaders import protocol, sandbox_protocol
from shiwu_worker.policy.callback_rules import CallbackRules
from shiwu_worker.stages.decode.decoder import decode
from tests.compat.shapes import shapes
from tests.support import bombs, pictures
from tests.support.loader_options import FORMATS, LIMITS, LOADER_OPTIONS, SPEC
from tests.support.lying_sandbox.sitecustomize import lies

EVENTS: Final = Path(__file__).parents[1] / "unit" / "watch" / "data"
RULES: Final = CallbackRules(tasks=("t", "app.*"))
LONGEST_SEED: Final = 10_000
REQUEST: Final = 7
TASK: Final = protocol.LoadTask(ticket=1, slot=0, image="https://h/p")


@dataclass(frozen=True, slots=True)
class Target:
    """One part that reads bytes from outside."""

    name: str
    seeds: Callable[[], list[bytes]]
    check: Callable[[bytes], None]
    """Raises when the part did what it must not; what it promises to raise is fine."""


def check_decode(data: bytes) -> None:
    """Pixels of the right shape, or Rejected with a code; nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels, info = decode(data, spec=SPEC, limits=LIMITS)
        except (Rejected, MemoryError):
            return
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert info.format in FORMATS
    assert 0 < info.width * info.height <= LIMITS.max_pixels


def check_message(data: bytes) -> None:
    """A request within the contract's bounds, or RequestError with a code; nothing else."""
    find_id(data)
    try:
        envelope = read_message(data)
        if envelope.canvas:
            RULES.check(read_canvas(data))
        request = parse_request(envelope.fields)
    except RequestError as error:
        _check_told(error)
        return
    again = build_message(request, job_id=envelope.id, lane=Lane.BULK)
    assert parse_request(read_message(again).fields) == request


def check_frames(data: bytes) -> None:
    """A reply of a sandbox, or a result of a loader, that it may give; or ProtocolError; nothing else."""
    with contextlib.suppress(sandbox_protocol.ProtocolError):
        reply = sandbox_protocol.read_reply(data, request=REQUEST, limits=LIMITS)
        assert reply.request == REQUEST
        if isinstance(reply, sandbox_protocol.Decoded):
            _check_size(reply.width, reply.height)
        elif not isinstance(reply, sandbox_protocol.ShortOfMemory):
            assert printable(reply.message) == reply.message
            assert len(reply.message) <= sandbox_protocol.MAX_TEXT
    with contextlib.suppress(sandbox_protocol.ProtocolError):
        hello = sandbox_protocol.read_hello(data)
        assert hello.thread > 0
        assert (hello.unfiltered_reason or "").isascii() or printable(hello.unfiltered_reason or "")
    with contextlib.suppress(protocol.ProtocolError):
        frame = protocol.read_loader_frame(data)
        if isinstance(frame, protocol.Loaded | protocol.LoadFailed):
            protocol.check_result(frame, TASK, sent_s=1.0, now_s=9.0, options=LOADER_OPTIONS)
            _check_result(frame)


def _check_size(width: int, height: int) -> None:
    assert min(width, height) > 0
    assert max(width, height) <= LIMITS.max_side
    assert width * height <= LIMITS.max_pixels


def _check_result(frame: protocol.LoadResult) -> None:
    assert (frame.ticket, frame.slot) == (TASK.ticket, TASK.slot)
    assert 1.0 <= frame.started_s <= frame.fetched_s <= frame.decoded_s <= 9.0
    if isinstance(frame, protocol.Loaded):
        _check_size(frame.width, frame.height)
        assert frame.format in FORMATS
        assert 0 < frame.n_bytes <= LOADER_OPTIONS.fetch.max_bytes
        assert len(bytes.fromhex(frame.sha256)) == 32
    else:
        assert frame.error.stage in {Stage.FETCH, Stage.DECODE}
        assert CODES[ErrorCode(frame.error.code)].fault is not Fault.CALLER


def _check_told(error: RequestError) -> None:
    assert error.code
    assert len(str(error)) < 2000


def check_events(data: bytes) -> None:
    """Events with references that workers accept, reasons to ignore them, or texts; nothing else."""
    found = read_event(data)
    assert found
    assert read_cloud_event({"ce-specversion": "1.0", "ce-id": "1", "ce-source": "s", "ce-type": "t"}, data)
    for each in found:
        if isinstance(each, ObjectStored):
            assert parse_request({"image": each.reference(has_version=True)}).image.startswith("s3://")
            check_id(each.id)
        elif not isinstance(each, Ignored):
            assert isinstance(each, Unreadable)
            assert len(each.reason) < 2000


@cache
def event_seeds() -> list[bytes]:
    """Recorded messages of every format, without line breaks."""
    return [msgspec.json.format(path.read_bytes(), indent=0) for path in sorted(EVENTS.glob("*.json"))]


@cache
def picture_seeds() -> list[bytes]:
    """Every kind of good file, small, and the bombs that are small."""
    small = pictures.picture().resize((48, 40))
    found = [make(small) for name, make in pictures.GOOD.items() if name != "large.jpg"]
    found += [pictures.saved(small, kind) for kind in ("BMP", "TIFF")]
    found += [pictures.saved(small, "PNG", save_all=True, append_images=[small.rotate(90)], duration=50)]
    found += [pictures.saved(small, "GIF", save_all=True, append_images=[small.rotate(90)], duration=50)]
    found += [bombs.jpeg_scans(scans=20, side=64), bombs.webp_frames(3), bombs.gif_frames(3), bombs.png_line()]
    return found


@cache
def message_seeds() -> list[bytes]:
    """Messages of our client and of Celery's, with all fields and with few, and some that are none."""
    chance = random.Random(1)
    requests = [
        Request(image="s3://bucket/key.jpg"),
        Request(image="https://example.com/a.png?x=1", labels=("猫", "狗"), top_k=3, threshold=0.5, head="sigmoid"),
        Request(image="file:///a.jpg", labels="six-zh", metadata={"a": [1, None, {"b": "ü"}]}, want=("embedding",)),
    ]
    found = [
        build_message(request, job_id=f"job-{number}", lane=Lane.BULK, sent_ms=1e12, expires_ms=2e12, eta_ms=1.5e12)
        for number, request in enumerate(requests)
    ]
    plain = (
        b'{"body":"[[\\"s3://b/k\\"],{},{\\"callbacks\\":[{\\"task\\":\\"t\\"}]}]","content-type":"application/json",'
    )
    plain += b'"headers":{"task":"shiwu.tag","id":"a","eta":null,"expires":"2030-01-01T00:00:00"},"properties":{}}'
    part = '{"task":"celery.group","subtask_type":"group","kwargs":{"tasks":[{"task":"app.a","options":{"link":[]}}]}}'
    nested = plain.replace(b'{\\"task\\":\\"t\\"}', part.replace('"', '\\"').encode())
    odd = [raw for raw, _, _ in shapes("s3://b/k").values() if len(raw) < LONGEST_SEED]
    return [*found, *odd, plain, nested, b"{}", b"[]", chance.randbytes(64), b"[" * 5000]


@cache
def frame_seeds() -> list[bytes]:
    """Frames of every type, and lies."""
    about: dict[str, Any] = {"n_bytes": 9, "format": "PNG", "width": 3, "height": 4, "sha256": "0" * 64}
    error = ErrorInfo(code=ErrorCode.SOURCE_THROTTLED, message="busy", stage=Stage.FETCH, retryable=True)
    replies: list[sandbox_protocol.Hello | sandbox_protocol.Reply] = [
        sandbox_protocol.Hello(thread=4711, unfiltered_reason="no filter"),
        sandbox_protocol.Decoded(REQUEST, 3, 4),
        sandbox_protocol.Refused(REQUEST, "picture_broken", "cut"),
        sandbox_protocol.ShortOfMemory(REQUEST),
        sandbox_protocol.DecoderFailed(REQUEST, "a defect: 茶"),
    ]
    frames: list[protocol.LoaderFrame] = [
        protocol.Ready("no filter"),
        protocol.SandboxFault("expected one reply"),
        protocol.Loaded(1, 0, 2.0, 3.0, 4.0, **about),
        protocol.Recognised(1, 0, 2.0, 3.0, 4.0, n_bytes=9, sha256="0" * 64),
        protocol.LoadFailed(1, 0, 2.0, 3.0, 4.0, error=error, detail="by a proxy", retry_after_s=3.5),
    ]
    told = [sandbox_protocol.encoded(reply) for reply in replies] + [protocol.ENCODER.encode(one) for one in frames]
    return told + [
        frame for frames_of_lie in lies(REQUEST).values() for frame in frames_of_lie if len(frame) < LONGEST_SEED
    ]


TARGETS: Final = {
    target.name: target
    for target in (
        Target("decode", picture_seeds, check_decode),
        Target("message", message_seeds, check_message),
        Target("frames", frame_seeds, check_frames),
        Target("events", event_seeds, check_events),
    )
}
