"""Messages of our own client with other bodies, headers and callbacks."""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from shiwu.broker.message_writer import build_message
from shiwu.contract import Lane, Request

BODY: Final = json.dumps([["s3://b/k"], {}, {}]).encode()
"""Of the smallest message."""


def message_with_body(body: bytes, **headers: Any) -> bytes:
    """A message with this body, and with other headers."""
    message = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    message["body"] = base64.b64encode(body).decode()
    message["headers"] |= headers
    return json.dumps(message).encode()


def canvas_message(embed: dict[str, Any], **headers: Any) -> bytes:
    """A message with callbacks."""
    raw = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    args, kwargs, _ = json.loads(base64.b64decode(raw["body"]))
    raw["body"] = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
    raw["headers"] |= headers
    return json.dumps(raw).encode()


def outer_message(**changes: Any) -> bytes:
    """A message of our own client with other parts of its envelope."""
    outer = json.loads(build_message(Request(image="s3://b/k"), job_id="x", lane=Lane.BULK))
    return json.dumps(outer | changes).encode()
