"""A sandbox that lies about marked images. Python imports this at its start where PYTHONPATH names the folder."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

MARK = b"LIE:"
"""Stands at the end of an image, before the name of the lie."""


def lies(request: int) -> dict[str, list[bytes]]:
    """Name → the frames that are sent in place of the reply to this request."""
    decoded: dict[str, Any] = {"type": "decoded", "request": request, "width": 64, "height": 64}
    refused: dict[str, Any] = {"type": "refused", "request": request, "code": "picture_broken", "message": "cut"}
    failed: dict[str, Any] = {"type": "decoder_failed", "request": request, "message": "x"}
    objects: dict[str, Any] = {
        "empty object": {},
        "null": None,
        "list": [decoded],
        "without a type": {"request": request, "width": 64, "height": 64},
        "unknown type": decoded | {"type": "tagged"},
        "hello again": {"type": "hello", "thread": os.getpid()},
        "result and error": decoded | refused | {"type": "decoded"},
        "error and result": decoded | refused | {"type": "refused"},
        "pixels that were not written": decoded,
        "reply to an earlier request": decoded | {"request": request - 1},
        "reply to a later request": decoded | {"request": request + 1},
        "no width": {"type": "decoded", "request": request, "height": 64},
        "width of zero": decoded | {"width": 0},
        "negative width": decoded | {"width": -64},
        "width as a text": decoded | {"width": "64"},
        "width with a fraction": decoded | {"width": 64.5},
        "side over the limit": decoded | {"width": 20_001},
        "pixels over the limit": decoded | {"width": 20_000, "height": 20_001},
        "huge number": decoded | {"width": 10**4000},
        "another format": decoded | {"format": "TIFF"},
        "hash of another image": decoded | {"sha256": "0" * 64},
        "error of fetch": refused | {"code": "source_not_found"},
        "error of the caller": refused | {"code": "expired"},
        "unknown error": refused | {"code": "no_such_code"},
        "not retried": refused | {"retryable": False},
        "another stage": refused | {"stage": "claim"},
        "line break": refused | {"message": "one\ntwo"},
        "escape sequence": failed | {"message": "\x1b[2J"},
        "text that reads backwards": refused | {"message": "\u202egnp"},
        "long text": refused | {"message": "x" * 1001},
        "no text": refused | {"message": None},
    }
    frames = {name: [json.dumps(value).encode()] for name, value in objects.items()}
    return frames | {
        "no bytes": [b""],
        "no JSON": [b"ok"],
        "no UTF-8": [b'{"type":"decoder_failed","request":1,"message":"\xff"}'],
        "deep": [b"[" * 10_000],
        "long frame": [json.dumps(decoded).encode() + b" " * 20_000],
        "other bytes behind": [json.dumps(decoded).encode() + b"{}"],
    }


def patch_sandbox() -> None:
    """Replace the loop of the sandbox's threads."""
    from shiwu_worker.loaders import sandbox, sandbox_protocol  # noqa: PLC0415 in the fork server only

    honest_decode = getattr(sandbox, "_decode")  # noqa: B009 private

    def work(channel: Any, number: int, shared: Any, options: Any, readiness: Any) -> None:
        readiness.is_set.wait()
        channel.send(sandbox_protocol.encoded(sandbox_protocol.Hello(thread=threading.get_native_id())))
        begin = number * shared.file_bytes
        while message := channel.recv(sandbox_protocol.REQUEST.size):
            request, length = sandbox_protocol.REQUEST.unpack(message)
            data = shared.files[begin : begin + length]
            _, _, lie = data.rpartition(MARK)
            if lie == data:
                frames = [sandbox_protocol.encoded(honest_decode(data, request, shared.pixels[number], options))]
            elif lie == b"silence":
                threading.Event().wait()
            elif lie == b"one more reply":
                reply = sandbox_protocol.encoded(honest_decode(data, request, shared.pixels[number], options))
                frames = [reply, reply]
            else:
                frames = lies(request)[lie.decode()]
            for frame in frames:
                channel.send(frame)

    setattr(sandbox, "_work", work)  # noqa: B010 private


if "shiwu_worker.loaders.fork_server_main" in sys.orig_argv:
    patch_sandbox()
