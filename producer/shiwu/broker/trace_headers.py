"""W3C trace context in message headers, in the same place as OpenTelemetry's instrumentation of Celery."""

from __future__ import annotations

import sys
from typing import Any, Final

import msgspec

from shiwu.contract import MAX_MESSAGE_BYTES

MAX_CHARS: Final = 512
"""A longer value is left out; the W3C recommendation requires no more of a tracestate."""


class _Headers(msgspec.Struct, frozen=True):
    traceparent: Any = None
    tracestate: Any = None


class _Outer(msgspec.Struct, frozen=True):
    headers: _Headers


_OUTER: Final[msgspec.json.Decoder[_Outer]] = msgspec.json.Decoder(_Outer)


def current_headers() -> dict[str, str]:
    """`traceparent` and, if set, `tracestate` of the caller's span; empty where there is no span.

    This never loads OpenTelemetry: a caller with a span has loaded it already.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    # An import instead of `sys.modules`, because another thread may still be importing the module.
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415 an optional dependency

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return _short(headers)


def read_headers(raw: bytes) -> dict[str, str]:
    """`traceparent` and `tracestate` of a message; empty where it has none or cannot be read."""
    if len(raw) > MAX_MESSAGE_BYTES:
        return {}
    try:
        headers = _OUTER.decode(raw).headers
    except (ValueError, RecursionError):
        return {}
    return _short({"traceparent": headers.traceparent, "tracestate": headers.tracestate})


def _short(headers: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in headers.items() if isinstance(text, str) and len(text) <= MAX_CHARS}
